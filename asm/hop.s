# Leave the running coroutine's stack for another one, let it be moved, and continue where it is then.
#
#   in    rdi  the function's first argument    rsi  the function, (argument, rsp) -> rsp
#         rdx  the end of a stack for it, 16-byte aligned
#   kept  rsp (or what the function made of it), rbx, rbp, saved as in asm/suspend.s
    lea     rax, [rip + 2f]         # rax <- where to continue
    mov     [rsp - {landing}], rax  # the stack looks suspended to the code that moves it
    mov     [rsp - {rbp}], rbp
    mov     [rsp - {rbx}], rbx
    mov     rax, rsi                # rax <- the function
    mov     rsi, rsp                # argument 2 <- our rsp
    mov     rsp, rdx                # onto the other stack
    call    rax
    mov     rsp, rax                # back, maybe at another address
    jmp     qword ptr [rsp - {landing}]
2:
    mov     rbp, [rsp - {rbp}]
    mov     rbx, [rsp - {rbx}]
