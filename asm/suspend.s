# Suspend the running coroutine: leave it resumable, return to its resumer.
#
#   in    r8   the resumer's rsp (from the thread variable, see switch::resumer)
#         rdx  our base                        rdi  the word for the resumer
#   out   rdi  the next resume's word          rsi  its command
#   kept  rsp, rbx, rbp, as in asm/resume.s. A store below may run into the guard page. Each is based on
#         rsp, so it is a growth point, and all that moves is in registers or below the top.
    lea     rax, [rip + 2f]         # rax <- where the next resume lands
    mov     [rsp - {landing}], rax  # the same layout as in asm/resume.s:
    mov     [rsp - {rbp}], rbp      # a suspended stack looks like one that has called
    mov     [rsp - {rbx}], rbx
    mov     rax, rsp                # rax <- what the resumer puts into the handle
    mov     rsp, r8                 # the switch
    jmp     qword ptr [rsp - {landing}] # lands at 2: of asm/resume.s
2:                                  # resumed: rsp and rax are ours, perhaps another address than before
    mov     rbp, [rax - {rbp}]
    mov     rbx, [rax - {rbx}]
