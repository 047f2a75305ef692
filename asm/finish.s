# Leave a coroutine for the last time. Nothing is saved.
#
#   in    r8   the resumer's rsp
#         rdi  the word for the resumer        rsi  the outcome
    xor     eax, eax                    # rax <- 0: the handle of a finished coroutine
    mov     rsp, r8                     # the switch
    jmp     qword ptr [rsp - 8]         # lands at 2: of asm/resume.s
