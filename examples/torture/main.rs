//! Torture.
mod workloads;
use regrow::torture::*;
fn main() {
    workloads::quiet_panics();
    let want = std::env::args().nth(1);
    let mode = match std::env::args().nth(2).as_deref() { Some("1") => Mode::Every(1), Some("r") => Mode::Random(5), Some("o") => Mode::Overflows, _ => Mode::GrowthPoints };
    for w in workloads::all() {
        if want.as_deref().is_some_and(|n| n != w.name && n != "all") { continue }
        let expected = w.on_a_plain_thread();
        let t = std::time::Instant::now();
        eprint!("{} ", w.name);
        let (value, report) = unsafe { Torture::new(mode).limit(3_000_000).run(w.run) };
        let e = t.elapsed();
        println!("{:20} same={} clean={} {:?} {:.1}us/step steps {} moves {} growths {} skipped {}", w.name, value.as_ref()==Some(&expected), report.is_clean(), e, e.as_micros() as f64/report.steps as f64, report.steps, report.moves, report.growths, report.skipped);
        if !report.is_clean() { println!("{report}"); }
        if value.is_some() && value != Some(expected.clone()) { println!("got {value:?}\nexpected {expected}"); }
    }
}
