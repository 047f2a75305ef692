//! x
mod measure; mod shapes; mod systems;
use measure::*; use shapes::*; use systems::*;
fn pin(core: usize) {
    unsafe { let mut set: libc::cpu_set_t = std::mem::zeroed(); libc::CPU_SET(core, &mut set); libc::sched_setaffinity(0, size_of_val(&set), &set); }
}
fn show(o: &Outcome) { print!("{:40}", o.shape); for (i,n) in o.names.iter().enumerate() { let s=o.nanoseconds(i); let r=o.ratio(i); print!(" | {n} {:.1} ({:.2} {:.2}-{:.2})", s.median, r.median, r.low, r.high); } println!(); }
fn main() {
    pin(1); { let mut g = Generator.spawn(|y, v: u64| { Generator::suspend(y, v); }); Generator::resume(&mut g, 1); Generator::resume(&mut g, 1);}
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
    for in_callee in [false] { for shuffled in [false,true] { for count in [10_000usize, 100_000] {
      println!("{count} shuffled {shuffled} callee {in_callee}");
      let how = |ahead| Many{count, shuffled, in_callee, ahead};
      let u = count as u64;
        let v = vec![Contestant::new("regrow", many(Regrow, how(0))).unit(u), 
             Contestant::new("8", many(Regrow, how(8))).unit(u), 
             Contestant::new("16", many(Regrow, how(16))).unit(u), 
             Contestant::new("32", many(Regrow, how(32))).unit(u), 
Contestant::new("reloc", many(Relocating::new(), how(0))).unit(u),
Contestant::new("reloc16", many(Relocating::new(), how(16))).unit(u),
         Contestant::new("coro", many(Region::corosensei(count,false), how(0))).unit(u),
        Contestant::new("coro col", many(Region::corosensei(count,true), how(0))).unit(u)];
        show(&contest("", 9, v));
      } } } 
}
