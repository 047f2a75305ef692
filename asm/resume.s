# Resume a coroutine: leave this context, enter that one, come back when it suspends or ends.
#
#   in    rcx  the handle: [rcx] the coroutine's saved rsp, [rcx + 8] its base
#         rdi  the word for the coroutine      rsi  the command
#   out   rdi  the coroutine's word            rsi  the outcome
#   kept  rsp, rbx, rbp. Everything else is clobbered: the compiler saves what it still needs,
#         and nothing when nothing is live. mxcsr and the x87 control word belong to the thread.
#
# rsp does not change before the switch, so the caller's unwind information holds at every
# instruction; what is saved goes into the red zone, which nobody writes while rsp is elsewhere.
    lea     rax, [rip + 2f]             # rax <- where to come back to
    mov     [rsp - 8], rax              # as if a call had pushed it ...
    mov     [rsp - 16], rbp             # ... and its callee had pushed rbp: a link of the rbp chain
    mov     [rsp - 24], rbx             # rbx is the compiler's own, it cannot be declared clobbered
    mov     [rsp - 32], rcx             # the handle: found here by the fault handler when the stack moves
    mov     r8, [rip + regrow_resumer@GOTTPOFF] # r8 <- the thread variable's offset (a constant once linked)
    mov     r9, fs:[r8]                 # r9 <- the resumer of whoever runs now, 0 outside coroutines
    mov     [rsp - 40], r9              # kept for when we are back
    mov     fs:[r8], rsp                # from here on the coroutine counts as running
    lea     r8, [rsp - 16]              # r8 <- our link of the rbp chain
    mov     rdx, [rcx + 8]              # rdx <- base, for the first frame (asm/switch.S)
    mov     rsp, [rcx]                  # the switch
    mov     [rdx], r8                   # the coroutine's outermost frame links to us: backtraces run through
    jmp     qword ptr [rsp - 8]         # jmp, not ret: the return stack stays in step with the calls
2:                                      # back: rsp is ours again, rax the coroutine's
    mov     r9, [rsp - 40]              # r9 <- the resumer before this one
    mov     r8, [rip + regrow_resumer@GOTTPOFF]
    mov     fs:[r8], r9                 # whoever ran before runs again
    mov     rcx, [rsp - 32]             # rcx <- the handle
    mov     [rcx], rax                  # the coroutine's rsp, for the next resume
    mov     rbp, [rsp - 16]
    mov     rbx, [rsp - 24]
