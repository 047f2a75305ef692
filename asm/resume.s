# Resume a coroutine: leave this context, enter the coroutine's, return when it suspends or ends.
#
#   in    rax  the coroutine's rsp             rdx  its base
#         rdi  the word for the coroutine      rsi  the command
#   out   rax  its rsp now, or ENDED           rdx  its base, which has moved if its stack has
#         rdi  the coroutine's word            rsi  the outcome, if it has ended
#   kept  rsp, rbx, rbp. All others are clobbered: the compiler saves only those that it still needs.
#         mxcsr and the x87 control word belong to the thread.
#
# Words stored below rsp are loaded through another register that holds the same address. If both accesses are
# based on rsp and rsp changed in between, processors do not match the load with the store until it has gone
# through memory. The jumps may be based on rsp: their target is predicted, so nothing waits for the load.
#
# rsp does not change before the switch, so the caller's unwind information holds at every
# instruction. The saved words go into the red zone, which no code writes while rsp is elsewhere.
    lea     rcx, [rip + 2f]         # rcx <- where to come back to
    mov     [rsp - {landing}], rcx  # as if a call had pushed it ...
    mov     [rsp - {rbp}], rbp      # ... and its callee had pushed rbp: a link of the rbp chain
    mov     [rsp - {rbx}], rbx      # rbx is the compiler's own, it cannot be declared clobbered
    mov     r8, [rip + regrow_resumer@GOTTPOFF] # r8 <- the thread variable's offset (a constant once linked)
    mov     r9, fs:[r8]             # r9 <- the resumer of the coroutine that runs now, 0 outside coroutines
    mov     [rsp - {resumer}], r9   # kept for when we are back
    mov     [rsp - {running}], rdx  # the base: corrected here by the fault handler when the stack moves
    mov     fs:[r8], rsp            # from here on the coroutine counts as running
    lea     r8, [rsp - {rbp}]       # r8 <- our link of the rbp chain
    mov     [rdx], r8               # the coroutine's outermost frame links to us: backtraces run through
    mov     rsp, rax                # the switch; rdx <- base, for the first frame (asm/switch.S)
    jmp     qword ptr [rsp - {landing}] # jmp, not ret: the return stack stays in step with the calls
2:                                  # back: rsp and r8 are ours again, rax the coroutine's
    mov     r9, [r8 - {resumer}]    # r9 <- the resumer before this one
    mov     rcx, [rip + regrow_resumer@GOTTPOFF]
    mov     fs:[rcx], r9            # the coroutine that ran before runs again
    mov     rbp, [r8 - {rbp}]
    mov     rbx, [r8 - {rbx}]
