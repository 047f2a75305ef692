; Statepoints whose frames are of the three kinds LLVM makes on x86-64: addressed from rsp, from rbp
; (dynamic size), from rbx (dynamic size and realigned). Written with typed pointers, which LLVM 14 wants and
; newer ones still read. Address space 1 holds the pointers to be recorded.
target triple = "x86_64-unknown-linux-gnu"

declare token @llvm.experimental.gc.statepoint.p0f_isVoidi64f(i64 immarg, i32 immarg, void (i64)*, i32 immarg, i32 immarg, ...)
declare i64 addrspace(1)* @llvm.experimental.gc.relocate.p1i64(token, i32 immarg, i32 immarg)
declare void @callee(i64)
declare void @fill(i8*)

; Two bases, a pointer derived from the first, null, and an alloca listed as live; deopt values of each kind.
; Returns what it reads through all four pointers after the call.
define i64 @pairs(i64 addrspace(1)* %a, i64 addrspace(1)* %b, i64 %i, i32 %j) gc "statepoint-example" {
  %slot = alloca i64 addrspace(1)*
  store i64 addrspace(1)* %a, i64 addrspace(1)** %slot
  %derived = getelementptr i64, i64 addrspace(1)* %a, i64 %i
  %safe = call token (i64, i32, void (i64)*, i32, i32, ...) @llvm.experimental.gc.statepoint.p0f_isVoidi64f(i64 7001, i32 0, void (i64)* elementtype(void (i64)) @callee, i32 1, i32 0, i64 %i, i32 0, i32 0) ["deopt"(i64 42, i64 %i, i32 %j, i64 addrspace(1)** %slot, i64 81985529216486895), "gc-live"(i64 addrspace(1)* %a, i64 addrspace(1)* %b, i64 addrspace(1)* %derived, i64 addrspace(1)* null, i64 addrspace(1)** %slot)]
  %a2 = call i64 addrspace(1)* @llvm.experimental.gc.relocate.p1i64(token %safe, i32 0, i32 0)
  %b2 = call i64 addrspace(1)* @llvm.experimental.gc.relocate.p1i64(token %safe, i32 1, i32 1)
  %derived2 = call i64 addrspace(1)* @llvm.experimental.gc.relocate.p1i64(token %safe, i32 0, i32 2)
  %null2 = call i64 addrspace(1)* @llvm.experimental.gc.relocate.p1i64(token %safe, i32 3, i32 3)
  %slot2 = load i64 addrspace(1)*, i64 addrspace(1)** %slot
  %is_null = icmp eq i64 addrspace(1)* %null2, null
  %va = load i64, i64 addrspace(1)* %a2
  %vb = load i64, i64 addrspace(1)* %b2
  %vd = load i64, i64 addrspace(1)* %derived2
  %vs = load i64, i64 addrspace(1)* %slot2
  %b1000 = mul i64 %vb, 1000
  %d1000000 = mul i64 %vd, 1000000
  %s1000000000 = mul i64 %vs, 1000000000
  %ab = add i64 %va, %b1000
  %abd = add i64 %ab, %d1000000
  %abds = add i64 %abd, %s1000000000
  %all = select i1 %is_null, i64 %abds, i64 0
  ret i64 %all
}

; Dynamic size: addressed from rbp.
define i64 @dynamic(i64 addrspace(1)* %a, i64 %n) gc "statepoint-example" {
  %buffer = alloca i8, i64 %n
  call void @fill(i8* %buffer)
  %safe = call token (i64, i32, void (i64)*, i32, i32, ...) @llvm.experimental.gc.statepoint.p0f_isVoidi64f(i64 7002, i32 0, void (i64)* elementtype(void (i64)) @callee, i32 1, i32 0, i64 %n, i32 0, i32 0) ["gc-live"(i64 addrspace(1)* %a)]
  %a2 = call i64 addrspace(1)* @llvm.experimental.gc.relocate.p1i64(token %safe, i32 0, i32 0)
  %va = load i64, i64 addrspace(1)* %a2
  ret i64 %va
}

; Dynamic size and realigned: addressed from rbx. %buffer and %wide are kept in registers across the
; statepoint, pointers into the stack that no record names.
define i64 @realigned(i64 addrspace(1)* %a, i64 %n) gc "statepoint-example" {
  %wide = alloca i8, i64 64, align 64
  %buffer = alloca i8, i64 %n
  call void @fill(i8* %buffer)
  call void @fill(i8* %wide)
  %safe = call token (i64, i32, void (i64)*, i32, i32, ...) @llvm.experimental.gc.statepoint.p0f_isVoidi64f(i64 7003, i32 0, void (i64)* elementtype(void (i64)) @callee, i32 1, i32 0, i64 %n, i32 0, i32 0) ["gc-live"(i64 addrspace(1)* %a)]
  %a2 = call i64 addrspace(1)* @llvm.experimental.gc.relocate.p1i64(token %safe, i32 0, i32 0)
  %va = load i64, i64 addrspace(1)* %a2
  call void @fill(i8* %buffer)
  call void @fill(i8* %wide)
  ret i64 %va
}
