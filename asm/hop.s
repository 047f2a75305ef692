# Leave the running coroutine's stack for another one, let it be moved, and go on where it is then.
#
#   in    rdi  the function's first argument    rsi  the function, (argument, rsp) -> rsp
#         rdx  the end of a stack for it, 16-byte aligned
#   kept  rsp (or what the function made of it), rbx, rbp, saved as in asm/suspend.s
    lea     rax, [rip + 2f]             # rax <- where to go on
    mov     [rsp - 8], rax              # the stack looks suspended to whoever moves it
    mov     [rsp - 16], rbp
    mov     [rsp - 24], rbx
    mov     rax, rsi                    # rax <- the function
    mov     rsi, rsp                    # argument 2 <- our rsp
    mov     rsp, rdx                    # onto the other stack
    call    rax
    mov     rsp, rax                    # back, perhaps elsewhere
    jmp     qword ptr [rsp - 8]
2:
    mov     rbp, [rsp - 16]
    mov     rbx, [rsp - 24]
