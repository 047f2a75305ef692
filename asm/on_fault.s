# The fault handler's first instructions: make sure that the rest has room, on a new stack if necessary.
#
#   in   rdi  the signal    rsi  its siginfo_t    rdx  its ucontext_t, which describes the alternate stack
#
# Nothing is pushed before the room is known: a stack that holds only the kernel's signal frame is enough.
# The new stack is a page-aligned mapping that lasts as long as one fault. From its end down it holds:
#
#   -8 the signal's rsp   -16 rbp   -24 signal   -32 siginfo   -40 ucontext   -48 the signal mask   ... frames
    .cfi_startproc
    mov     rax, rsp
    sub     rax, [rdx + {ss_sp}]        # rax <- the rest of the alternate stack, if this is it
    cmp     rax, [rdx + {ss_size}]
    jae     2f                          # it is not: how much is left is unknown
    cmp     rax, {enough}
    jae     {handle}                    # there is room
2:
    movq    xmm0, rdi                   # a system call takes all other registers that may be changed
    movq    xmm1, rsi
    movq    xmm2, rdx
    xor     edi, edi
    mov     esi, {own}
    mov     edx, {access}
    mov     r10d, {flags}
    mov     r8, -1
    xor     r9d, r9d
    mov     eax, {mmap}
    syscall                             # rax <- the stack
    movq    rdi, xmm0
    movq    rsi, xmm1
    movq    rdx, xmm2
    cmp     rax, -4096
    ja      3f                          # an error
    lea     r8, [rax + {own} - 48]      # r8 <- the words at its end
    mov     [r8 + 40], rsp
    mov     [r8 + 32], rbp
    mov     [r8 + 24], rdi
    mov     [r8 + 16], rsi
    mov     [r8 + 8], rdx
    # No signal until we are back: its frame would begin at the end of the alternate stack, over our siginfo
    # and ucontext. The kernel has blocked all signals for us, but a handler that calls this one may not have.
    mov     edi, {set_mask}
    lea     rsi, [rip + {all_signals}]
    mov     rdx, r8
    mov     r10d, 8
    mov     eax, {sigprocmask}
    syscall
    lea     rbp, [r8 + 32]
    # To unwinders: CFA = [rbp + 8] + 8, and rbp at [rbp].
    .cfi_escape 0x0f, 5, 0x76, 0x08, 0x06, 0x23, 0x08
    .cfi_escape 0x10, 6, 2, 0x76, 0x00
    mov     rdi, [r8 + 24]
    mov     rsi, [r8 + 16]
    mov     rdx, [r8 + 8]
    mov     rsp, r8
    call    {serve}                     # al <- whether it was ours
    mov     r8, rsp
    mov     rsp, [r8 + 40]
    mov     rbp, [r8 + 32]
    .cfi_def_cfa rsp, 8
    .cfi_restore rbp
    movzx   r9d, al
    mov     edi, {set_mask}
    mov     rsi, r8
    xor     edx, edx
    mov     r10d, 8
    mov     eax, {sigprocmask}
    syscall
    mov     rdx, [r8 + 8]               # rdx <- the ucontext
    mov     r10, [r8 + 16]              # r10 <- the siginfo
    lea     rdi, [r8 + 48 - {own}]
    mov     r8, [r8 + 24]               # r8 <- the signal
    mov     esi, {own}
    mov     eax, {munmap}
    syscall
    mov     edi, r8d
    mov     rsi, r10
    test    r9d, r9d
    jz      {pass_on}                   # with the rsp it would have had without us
    ret
3:
    mov     rcx, rsp
    sub     rcx, [rdx + {ss_sp}]
    cmp     rcx, [rdx + {ss_size}]
    jae     {handle}                    # not the alternate stack: there may be room
    mov     rsp, [rdx + {ss_sp}]
    add     rsp, [rdx + {ss_size}]      # what is on it is not needed any more: nothing goes back
    and     rsp, -16
    .cfi_undefined rip
    call    {no_stack}
    ud2
    .cfi_endproc
