//! Torture.
use regrow::torture::{Mode, Torture};
#[test]
fn one() {
    let culprit = || {
        let numbers = std::hint::black_box([1u32, 2, 3]);
        let references: Vec<&u32> = numbers.iter().collect();
        references.into_iter().sum::<u32>()
    };
    let (value, report) = unsafe { Torture::new(Mode::GrowthPoints).run(culprit) };
    println!("{value:?} {report}");
    for mode in [Mode::GrowthPoints, Mode::Every(1), Mode::Random(7), Mode::Overflows] {
        let (value, report) =
            unsafe { Torture::new(mode).run(|| format!("{:?} {}", [1.5, 2.5], "x".repeat(50))) };
        println!("{value:?} {report}");
        for f in report.functions().iter().take(5) {
            println!("{f:?}");
        }
    }
}
