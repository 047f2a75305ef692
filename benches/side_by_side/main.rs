//! x
mod measure; mod shapes; mod systems;
use measure::*; use shapes::*; use systems::*;
fn pin(core: usize) {
    unsafe { let mut set: libc::cpu_set_t = std::mem::zeroed(); libc::CPU_SET(core, &mut set); libc::sched_setaffinity(0, size_of_val(&set), &set); }
}
fn show(o: &Outcome) { print!("{:40}", o.shape); for (i,n) in o.names.iter().enumerate() { let s=o.nanoseconds(i); let r=o.ratio(i); print!(" | {n} {:.1} ({:.2} {:.2}-{:.2})", s.median, r.median, r.low, r.high); } println!(); }
fn main() {
    pin(1);
    macro_rules! all { ($f:expr) => {{ vec![Contestant::new("regrow", $f(Regrow)), Contestant::new("reloc", $f(Relocating::new())), Contestant::new("corosensei", $f(corosensei())), Contestant::new("generator", $f(Generator))] }} }
    macro_rules! c { ($n:expr, $s:ident => $e:expr) => { show(&contest($n, 31, vec![
        Contestant::new("regrow", { let $s = Regrow; $e }), Contestant::new("corosensei", { let $s = corosensei(); $e }), Contestant::new("generator", { let $s = Generator; $e })])) } }
    c!("root ()", s => root_loop::<_, ()>(s));
    c!("root u64", s => root_loop::<_, u64>(s));
    c!("root 64B", s => root_loop::<_, [u64;8]>(s));
    c!("fresh callee", s => fresh_callee(s));
    c!("deep co", s => deep(s,5,0));
    c!("deep res", s => deep(s,0,5));
    c!("deep both", s => deep(s,5,5));
    c!("sites/100", s => sites(s));
    for in_callee in [false, true] { for shuffled in [false,true] { for count in [10_000usize, 100_000] {
      for ahead in [0usize, 4, 8, 16] {
        let how = Many{count, shuffled, in_callee, ahead};
        println!("{count} shuffled {shuffled} callee {in_callee} ahead {ahead}");
        let u = count as u64;
        let mut v = vec![Contestant::new("regrow", many(Regrow, how)).unit(u), Contestant::new("reloc", many(Relocating::new(), how)).unit(u)];
        if ahead == 0 { v.push(Contestant::new("coro", many(Region::corosensei(count,false), how)).unit(u)); 
        v.push(Contestant::new("coro col", many(Region::corosensei(count,true), how)).unit(u)); }
        if ahead == 0 && count == 10_000 {v.push(Contestant::new("coro default", many(corosensei(), how)).unit(u)); }
        show(&contest("", 9, v));
      } } } }
}
