# Resume a coroutine: leave this context, enter that one, come back when it suspends or ends.
#
#   in    rcx  the handle: [rcx] the coroutine's saved rsp, [rcx + 8] its base
#         rdi  the word for the coroutine      rsi  the command
#   out   rdi  the coroutine's word            rsi  the outcome
#   kept  rsp, rbx, rbp. Everything else is clobbered: the compiler saves what it still needs,
#         and nothing when nothing is live. mxcsr and the x87 control word belong to the thread.
#
# Two words are only stored if they differ from what is there: in most programs they never do, and a load need not wait
# for a store that was skipped. Otherwise each round would wait for the one before, through memory, twice more.
#
# rsp does not change before the switch, so the caller's unwind information holds at every
# instruction; what is saved goes into the red zone, which nobody writes while rsp is elsewhere.
    lea     rax, [rip + 2f]             # rax <- where to come back to
    mov     [rsp - 8], rax              # as if a call had pushed it ...
    mov     [rsp - 16], rbp             # ... and its callee had pushed rbp: a link of the rbp chain
    mov     [rsp - 24], rbx             # rbx is the compiler's own, it cannot be declared clobbered
    mov     r8, [rip + regrow_resumer@GOTTPOFF] # r8 <- the thread variable's offset (a constant once linked)
    mov     r9, fs:[r8]                 # r9 <- the resumer of whoever runs now, 0 outside coroutines
    cmp     r9, [rsp - 32]              # a page that was just stored to: a load must not be what finds the guard
    je      3f                          # kept there since the last time
    mov     [rsp - 32], r9              # kept for when we are back
3:
    mov     [rsp - 40], rcx             # the handle: found here by the fault handler when the stack moves
    mov     fs:[r8], rsp                # from here on the coroutine counts as running
    lea     r8, [rsp - 16]              # r8 <- our link of the rbp chain
    mov     rdx, [rcx + 8]              # rdx <- base, for the first frame (asm/switch.S)
    mov     rsp, [rcx]                  # the switch
    mov     [rdx], r8                   # the coroutine's outermost frame links to us: backtraces run through
    jmp     qword ptr [rsp - 8]         # jmp, not ret: the return stack stays in step with the calls
2:                                      # back: rsp is ours again, rax the coroutine's
    mov     r9, [rsp - 32]              # r9 <- the resumer before this one
    mov     r8, [rip + regrow_resumer@GOTTPOFF]
    mov     fs:[r8], r9                 # whoever ran before runs again
    mov     rcx, [rsp - 40]             # rcx <- the handle
    cmp     rax, [rcx]                  # the coroutine's rsp: where it was the last time?
    je      4f
    mov     [rcx], rax                  # for the next resume
4:
    mov     rbp, [rsp - 16]
    mov     rbx, [rsp - 24]
