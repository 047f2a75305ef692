//! Any bytes as a section `.llvm_stackmaps`: read whatever there is to read.
//!
//! ```text
//! cargo +nightly fuzz run llvm_stackmaps fuzz/corpus/llvm_stackmaps tests/llvm -- -max_total_time=180 -malloc_limit_mb=64
//! ```
#![no_main]

use libfuzzer_sys::fuzz_target;
use regrow::map::llvm::{Kind, tables};
use regrow::map::{StackMaps, Verdict};

fuzz_target!(|section: &[u8]| {
    let mut items = 0;
    for table in tables(section) {
        let Ok(table) = table else { continue };
        let constants: Vec<u64> = table.constants().collect();
        items += constants.len() + table.functions().len();
        for (_, record) in table.sites() {
            items += 1 + record.locations().len() + record.live_outs().count();
            for location in record.locations().filter(|location| location.kind == Kind::ConstantIndex) {
                // Checked when the table was read.
                std::hint::black_box(constants[location.value as u32 as usize]);
            }
        }
        assert_eq!(table.sites().count(), table.records().count());
        for map in table.frame_maps(Verdict::Ambiguous, |_| true).flatten() {
            assert!(map.words().len() <= u16::MAX.into());
            let (range, maps) = (map.range(), StackMaps::new());
            if maps.register(vec![map]).is_ok() {
                assert!(range.start < range.end);
            }
        }
    }
    assert!(items <= section.len() / 4, "{items} items in {} bytes", section.len());
});
