//! Every call in the code of this program can be walked through; in the libraries it uses, nearly every one (stripped start-up code aside).

use std::collections::BTreeMap;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};
use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSymbol, SectionKind};
use regrow::map::{self, ObjectReport};

#[derive(Default)]
struct Count {
    calls: usize,
    walkable: usize,
    /// How many calls of a function cannot be walked through, and why not.
    others: BTreeMap<(String, String), usize>,
}

/// Decodes all code of an object, one instruction after the other.
fn count(object: &ObjectReport, file: &[u8]) -> Count {
    let elf = ElfFile64::<object::Endianness>::parse(file).expect("an ELF file");
    let mut symbols: Vec<_> = elf
        .symbols()
        .chain(elf.dynamic_symbols())
        .filter(|symbol| symbol.kind() == object::SymbolKind::Text)
        .map(|symbol| (symbol.address(), symbol.size(), symbol.name().unwrap_or("?").to_owned()))
        .collect();
    symbols.sort();
    let name = |address: u64| {
        let after = symbols.partition_point(|(start, ..)| *start <= address);
        let found = symbols[..after].last().filter(|(start, size, _)| *size == 0 || address - start < *size);
        found.map_or("?".to_owned(), |(.., name)| name.clone())
    };
    let reader = map::process().read();
    let mut count = Count::default();
    for section in elf.sections().filter(|section| section.kind() == SectionKind::Text) {
        let code = section.data().unwrap();
        let mut decoder = Decoder::with_ip(64, code, section.address(), DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        while decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            if !matches!(instruction.flow_control(), FlowControl::Call | FlowControl::IndirectCall)
                || instruction.mnemonic() == iced_x86::Mnemonic::Syscall
            {
                continue;
            }
            count.calls += 1;
            let last_byte = object.address + instruction.next_ip() as usize - 1;
            let why = match reader.find(last_byte).and_then(|map| map.rules()) {
                Some(Ok(_)) => {
                    count.walkable += 1;
                    continue;
                }
                Some(Err(reason)) => reason.to_string(),
                None => "no unwind tables".to_owned(),
            };
            let of = format!("{} ({})", name(instruction.ip()), section.name().unwrap_or("?"));
            *count.others.entry((of, why)).or_default() += 1;
        }
    }
    count
}

#[test]
fn calls_can_be_walked_through() {
    let report = map::record_loaded_objects();
    println!("{report}");
    for object in &report.added {
        let path = if object.name.is_empty() { "/proc/self/exe" } else { &object.name };
        let Ok(file) = std::fs::read(path) else { continue }; // the vdso has none
        let Count { calls, walkable, others } = count(object, &file);
        println!("{path}: {walkable} of {calls} calls can be walked through");
        for ((function, why), times) in &others {
            println!("{times:6} in {function}: {why}");
        }
        // The compiler's start-up files have no tables for what runs before and after everything else.
        let outside = ["_init (.init)", "_fini (.fini)", "__do_global_dtors_aux (.text)"];
        let inside = others.iter().filter(|((function, _), _)| !outside.contains(&function.as_str()));
        let inside: usize = inside.map(|(_, times)| times).sum();
        if object.name.is_empty() {
            assert_eq!(inside, 0, "calls in this program that cannot be walked through");
        }
        assert!(inside * 100 <= calls, "more than one in a hundred in {path}");
    }
}
