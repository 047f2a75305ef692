; A stack map and a patch point: values in registers, small and large constants of both signs, the
; address of an alloca, live-out registers.
target triple = "x86_64-unknown-linux-gnu"

declare void @llvm.experimental.stackmap(i64, i32, ...)
declare i64 @llvm.experimental.patchpoint.i64(i64, i32, i8*, i32, ...)
declare void @fill(i64*)

define i64 @values(i64 %x, i8* %p) {
  %slot = alloca i64, i64 4
  call void @fill(i64* %slot)
  call void (i64, i32, ...) @llvm.experimental.stackmap(i64 11, i32 0, i64 %x, i32 -1, i64 81985529216486895, i64* %slot, i8* %p)
  %r = call i64 (i64, i32, i8*, i32, ...) @llvm.experimental.patchpoint.i64(i64 12, i32 15, i8* inttoptr (i64 -559038736 to i8*), i32 1, i64 %x, i64 7, i64 81985529216486895, i64* %slot, i64 -81985529216486896)
  ret i64 %r
}

; Three small constants first: the shape of a statepoint, which only the id tells apart.
define void @disguised(i64 %x) {
  call void (i64, i32, ...) @llvm.experimental.stackmap(i64 13, i32 0, i64 0, i64 0, i64 0)
  ret void
}
