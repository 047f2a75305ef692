# Leave a coroutine for the last time. Nothing is saved.
#
#   in    r8   the resumer's rsp               rdx  our base
#         rdi  the word for the resumer        rsi  the outcome
    mov     eax, {ended}            # rax <- ENDED, for the handle
    mov     rsp, r8                 # the switch
    jmp     qword ptr [rsp - {landing}] # lands at 2: of asm/resume.s
