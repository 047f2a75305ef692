//! Smoke.
use regrow::*;
#[test]
fn smoke() {
    fn deep(n: u64, p: &mut u64) -> u64 { let a = std::hint::black_box([n as u8; 256]); if n == 0 { *p = 77; return 0; } deep(n - 1, p) + a[5] as u64 }
    let mut b = unsafe { Builder::new().relocating() };
    for round in 0..2 {
    let mut c = b.clone().maximum(256<<20).spawn(|_: &Yielder<(), ()>, ()| { let mut v = 1; let r = deep(1000, &mut v); assert_eq!(v, 77); (r, current_stats()) });
    println!("{:?}", c.resume(()));
    println!("{:?}", totals());
    b = Builder::new();
    let _ = round;
    }
}
#[test]
fn panics() {
    let mut c = Coroutine::<u32, u32, ()>::new(|y, mut v| { loop { v = y.suspend(v + 1); if v == 9 { panic!("nine"); } } });
    assert_eq!(c.resume(1), CoroutineResult::Yield(2));
    let e = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| c.resume(9))).unwrap_err();
    assert_eq!(*e.downcast_ref::<&str>().unwrap(), "nine");
    let mut c = Coroutine::<u32, u32, ()>::new(|y, v| { struct D; impl Drop for D { fn drop(&mut self) { println!("dropped"); } } let _d = D; y.suspend(v); });
    c.resume(1);
    drop(c);
}
