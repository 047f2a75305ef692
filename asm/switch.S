// The part of the switch that is not inlined: the first frame of every coroutine, and the thread's variables.
//
// The switch itself is inlined into its callers: asm/resume.s, asm/suspend.s,
// asm/finish.s. src/switch.rs draws the words that they leave on the stacks.

    .intel_syntax noprefix
    .include "frame_map.inc"

// These numbers are those of src/switch.rs, where a test compares them: distances below a stack pointer, flags, outcomes, sizes.
    .set    LANDING, 8
    .set    WATCHED_LANDING, 48
    .set    ENDED, 1
    .set    WATCHED, 2
    .set    RETURNED, 1
    .set    BASE_OWNER, 16
    .set    RAW_FUNCTION, 16            // below the record: the place of a closure of this size
    .set    WORDS, 40

// regrow_resumer: one word per thread, the stack pointer of the running coroutine's resumer, or 0 when no coroutine
// runs. It lies in a line that is always hot, and not on the coroutine's stack: a suspend must know where to go before
// the coroutine's own lines have arrived. Initial-exec: reading it is one load off `fs` and never calls the loader.
    .section .tbss, "awT", @nobits
    .globl  regrow_resumer
    .type   regrow_resumer, @object
    .size   regrow_resumer, 8
    .p2align 3
regrow_resumer:
    .zero 8

// regrow_words: the other words of a thread that the fault handler reads or writes (src/words.rs). Also initial-exec:
// in a library that was loaded later, other thread-local variables may be allocated at their first use.
    .globl  regrow_words
    .hidden regrow_words
    .type   regrow_words, @object
    .size   regrow_words, WORDS
    .p2align 3
regrow_words:
    .zero WORDS

// regrow_entry: where a coroutine's first resume lands. Its frame is
// the outermost one on the stack and lasts as long as the coroutine.
//
//   in   rsp  the base (16-byte aligned); rdx the same
//        rdi  the word passed to the first resume
//        rsi  the command (resume; a coroutine that never ran is dropped without being resumed)
//   out  entry(rdi = word, rsi = command, rdx = base) by a jump, with a return address below the base.
//        It is a jump with a pushed address, not a call: nothing ever returns through it, and
//        an unmatched call would leave the processor's return stack one entry off.
//
// To an unwinder this frame's caller is the latest resumer: each resume leaves the address of its own {rbp,
// return address} pair in [base]. So the CFA is [base] + 16, and the caller's registers lie below it as
// after an ordinary prologue (see asm/resume.s): rip at CFA-8, rbp at CFA-16, rbx at CFA-24. A resume
// clobbers the others. It is a `signal_frame`, because otherwise gdb takes a caller at a lower address for a
// corrupt stack, and because the return address is then looked up unchanged, not minus one as after a call.
    .text
    .globl  regrow_entry
    .type   regrow_entry, @function
    .p2align 4
regrow_entry:
    .cfi_startproc
    .cfi_signal_frame
    // DW_CFA_def_cfa_expression: DW_OP_breg7 (rsp) 0, DW_OP_deref, DW_OP_plus_uconst 16. Based on rsp, although rbp is
    // the base here, too: a signal may come between a switch and the load of rbp, and unwinders would follow a wrong rbp.
    .cfi_escape 0x0f, 5, 0x77, 0x00, 0x06, 0x23, 0x10
    .cfi_offset rip, -LANDING
    .cfi_offset rbp, -16
    .cfi_offset rbx, -24
    mov     rbp, rdx                    // rbp <- base: the rbp chain runs through [base] to the resumer
    lea     rax, [rip + regrow_entry_return] // rax <- the return address the entry function sees
    push    rax                         // rsp = base - 8: what a call would have left
    .cfi_escape 0x0f, 5, 0x77, 0x08, 0x06, 0x23, 0x10
    jmp     qword ptr [rsp - 16]        // the entry function, put at [base - 24] by the constructor
    .cfi_escape 0x0f, 5, 0x77, 0x00, 0x06, 0x23, 0x10 // returned to, as rsp is then
    nop                                 // unwinders look one byte before a return address
    .globl  regrow_entry_return
regrow_entry_return:
    ud2                                 // an entry function ends in asm/finish.s and never returns
    .cfi_endproc
    .size   regrow_entry, . - regrow_entry

// regrow_raw: the entry function of a raw coroutine (Builder::spawn_raw). It is entered by a jump, as all entry functions are.
//
//   in   rdi  the word passed to the first resume    rdx  the base
//        [[base + 16] - 16]  the function to call, rdi = base, rsi = word; its result is the coroutine's
//
// Its frame is one word, which is unused.
    .globl  regrow_raw
    .type   regrow_raw, @function
    .p2align 4
regrow_raw:
    .cfi_startproc
    mov     rax, [rdx + BASE_OWNER]     // rax <- the record
    mov     rsi, rdi                    // argument 2 <- the word
    mov     rdi, rdx                    // argument 1 <- the base, which is the yielder
    sub     rsp, 8                      // aligned for the call
    .cfi_adjust_cfa_offset 8
    call    qword ptr [rax - RAW_FUNCTION] // the function
    mov     rdi, rax                    // rdi <- its result, for the resumer
    lea     rdx, [rsp + 16]             // rdx <- the base: above are this frame's word and its return address
    mov     esi, RETURNED
    mov     r8, [rip + regrow_resumer@GOTTPOFF]
    mov     r8, fs:[r8]                 // r8 <- the resumer's rsp
    mov     eax, ENDED                  // for the handle; from here on as in asm/finish.s
    mov     rsp, r8
    jmp     qword ptr [rsp - LANDING]
    .cfi_endproc
1:
    .size   regrow_raw, . - regrow_raw
    frame_map_range regrow_raw, 1b
    frame_map_rest  data
    frame_map_end

// regrow_watch: where a suspend lands instead of at its resumer, after the stack has grown (src/grow/shrink.rs).
//
//   in   rsp, r8  the resumer's; rax the coroutine's; rdx, rdi, rsi as for the resumer
//   out  rax with WATCHED set; goes on to the resumer's landing, kept at [rsp - WATCHED_LANDING]
//
// To an unwinder that comes from the coroutine, it is an empty frame between the first frame and the resumer.
    .globl  regrow_watch_landing
    .type   regrow_watch, @function
    .p2align 4
regrow_watch:
    .cfi_startproc
    .cfi_signal_frame
    .cfi_def_cfa rsp, 0
    .cfi_offset rip, -WATCHED_LANDING
    nop                                 // some look up a return address by the byte before it
regrow_watch_landing:
    or      rax, WATCHED
    jmp     qword ptr [rsp - WATCHED_LANDING]
    .cfi_endproc
    .size   regrow_watch, . - regrow_watch

// regrow_call_on: calls a function on another stack, through which unwinders can pass.
//
//   in   rdi  the function's argument     rsi  the function     rdx  the end of the stack, 16-byte aligned
    .globl  regrow_call_on
    .type   regrow_call_on, @function
    .p2align 4
regrow_call_on:
    .cfi_startproc
    push    rbp
    .cfi_def_cfa_offset 16
    .cfi_offset rbp, -16
    mov     rbp, rsp                    // rbp <- this stack, to unwinders as well
    .cfi_def_cfa_register rbp
    mov     rsp, rdx
    call    rsi
    leave                               // rsp <- this stack
    .cfi_def_cfa rsp, 8
    ret
    .cfi_endproc
    .size   regrow_call_on, . - regrow_call_on

    .section .note.GNU-stack, "", @progbits
