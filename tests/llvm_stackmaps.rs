//! The reader of `.llvm_stackmaps`: sections written here from random models, mutated ones, and those that
//! LLVM itself makes from `tests/llvm/*.ll` where there is an `llc` (any version; otherwise the sections
//! checked in).

#[path = "support/corpus.rs"]
mod corpus;
mod recorded;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
use proptest::prelude::*;
use regrow::map::llvm::{self, Kind, Location, Reason, Table, tables};
use regrow::map::{self, FrameMap, Place, Register, Registration, Source, Verdict};

/// Counts what this thread allocates, to show that reading allocates nothing.
struct Counting;

thread_local! {
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: the system's allocator does the work; the counter is a constant-initialised thread-local without
// a destructor, which allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.set(ALLOCATED.get() + layout.size());
        // SAFETY: our caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: our caller's contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// A table, as a value.
#[derive(Clone, PartialEq, Debug)]
struct Model {
    /// Address, stack size, records.
    functions: Vec<(u64, Option<u64>, Vec<RecordModel>)>,
    constants: Vec<u64>,
}

#[derive(Clone, PartialEq, Debug)]
struct RecordModel {
    id: u64,
    offset: u32,
    locations: Vec<Location>,
    live_outs: Vec<(u16, u8)>,
}

/// Writes a table as LLVM would.
fn write(model: &Model, section: &mut Vec<u8>) {
    let records = model.functions.iter().map(|function| function.2.len()).sum::<usize>();
    section.extend([3, 0, 0, 0]);
    for count in [model.functions.len(), model.constants.len(), records] {
        section.extend((count as u32).to_le_bytes());
    }
    for (address, size, records) in &model.functions {
        for number in [*address, size.unwrap_or(u64::MAX), records.len() as u64] {
            section.extend(number.to_le_bytes());
        }
    }
    section.extend(model.constants.iter().flat_map(|constant| constant.to_le_bytes()));
    for record in model.functions.iter().flat_map(|function| &function.2) {
        section.extend(record.id.to_le_bytes());
        section.extend(record.offset.to_le_bytes());
        section.extend([0, 0]);
        section.extend((record.locations.len() as u16).to_le_bytes());
        for location in &record.locations {
            section.extend([location.kind as u8, 0]);
            section.extend(location.size.to_le_bytes());
            section.extend(location.register.to_le_bytes());
            section.extend([0, 0]);
            section.extend(location.value.to_le_bytes());
        }
        section.resize(section.len().next_multiple_of(8), 0);
        section.extend([0, 0]);
        section.extend((record.live_outs.len() as u16).to_le_bytes());
        for (register, size) in &record.live_outs {
            section.extend(register.to_le_bytes());
            section.extend([0, *size]);
        }
        section.resize(section.len().next_multiple_of(8), 0);
    }
}

/// The inverse of [`write`], by the reader under test.
fn read(table: &Table<'_>) -> Model {
    let mut records = table.records().map(|record| RecordModel {
        id: record.id(),
        offset: record.offset(),
        locations: record.locations().collect(),
        live_outs: record.live_outs().map(|live_out| (live_out.register, live_out.size)).collect(),
    });
    let functions = table.functions().map(|function| {
        (function.address, function.stack_size, records.by_ref().take(function.records as usize).collect())
    });
    let model = Model { functions: functions.collect(), constants: table.constants().collect() };
    assert!(records.next().is_none());
    model
}

/// Any location; `constants` of the table can be named.
fn location(constants: usize) -> impl Strategy<Value = Location> {
    let kinds = [Kind::Register, Kind::Direct, Kind::Indirect, Kind::Constant, Kind::ConstantIndex];
    let usable = if constants == 0 { 4usize } else { 5 };
    let size = prop_oneof![Just(8), Just(16), Just(4), any::<u16>()];
    let register = prop_oneof![Just(7), Just(6), Just(3), 0..16u16, any::<u16>()];
    let value = prop_oneof![(-64..64i32).prop_map(|word| word * 8), any::<i32>()];
    (0..usable, size, register, value).prop_map(move |(kind, size, register, value)| Location {
        kind: kinds[kind],
        size,
        register,
        value: if kinds[kind] == Kind::ConstantIndex { value.rem_euclid(constants as i32) } else { value },
    })
}

/// The locations of a statepoint, more or less.
fn statepoint(constants: usize) -> impl Strategy<Value = Vec<Location>> {
    let constant = |value| Location { kind: Kind::Constant, size: 8, register: 0, value };
    let some = move |most| prop::collection::vec(location(constants), 0..=most);
    (some(4), some(8), 0..4i32).prop_map(move |(deopts, pairs, flags)| {
        let mut all = vec![constant(0), constant(flags), constant(deopts.len() as i32)];
        all.extend(deopts);
        all.extend(pairs);
        all
    })
}

fn record(constants: usize) -> impl Strategy<Value = RecordModel> {
    let locations = prop_oneof![prop::collection::vec(location(constants), 0..6), statepoint(constants)];
    let live_outs = prop::collection::vec(any::<(u16, u8)>(), 0..4);
    (any::<u64>(), any::<u32>(), locations, prop_oneof![Just(vec![]), live_outs])
        .prop_map(|(id, offset, locations, live_outs)| RecordModel { id, offset, locations, live_outs })
}

fn model() -> impl Strategy<Value = Model> {
    prop::collection::vec(any::<u64>(), 0..4).prop_flat_map(|constants| {
        let size = prop_oneof![Just(None), (0..1u64 << 40).prop_map(Some)];
        let records = prop::collection::vec(record(constants.len()), 0..4);
        let functions = prop::collection::vec((any::<u64>(), size, records), 0..4);
        functions.prop_map(move |functions| Model { functions, constants: constants.clone() })
    })
}

/// A section of several tables, with the zeros that a linker may put between them.
fn section() -> impl Strategy<Value = (Vec<Model>, Vec<u8>)> {
    prop::collection::vec((model(), 0..3usize), 0..4).prop_map(|parts| {
        let mut section = Vec::new();
        for (model, padding) in &parts {
            write(model, &mut section);
            section.resize(section.len() + 8 * padding, 0);
        }
        (parts.into_iter().map(|(model, _)| model).collect(), section)
    })
}

/// Reads everything there is to read, and checks what must hold of any bytes.
fn exhaust(section: &[u8]) {
    let before = ALLOCATED.get();
    let mut items = 0;
    for table in tables(section) {
        let Ok(table) = table else { continue };
        items += table.functions().count() + table.constants().count();
        for (_, record) in table.sites() {
            items += 1 + record.locations().count() + record.live_outs().count();
            if let Some(statepoint) = record.statepoint() {
                let parts =
                    statepoint.deopts().len() + 2 * statepoint.pairs().count() + statepoint.allocas().len();
                assert_eq!(parts + 3, record.locations().len());
            }
        }
        assert_eq!(table.sites().count(), table.records().count());
    }
    assert_eq!(ALLOCATED.get(), before, "reading allocated");
    // The smallest thing there is, a live-out, takes 4 bytes.
    assert!(items <= section.len() / 4, "{items} items in {} bytes", section.len());
    for table in tables(section).flatten() {
        for map in table.frame_maps(Verdict::Ambiguous, |_| true).flatten() {
            assert!(map.words().len() <= u16::MAX.into());
            // Accepted or refused: addresses may be absurd.
            let maps = map::StackMaps::new();
            let (range, refused) = (map.range(), maps.register(vec![map]).is_err());
            assert_eq!(refused, range.start > range.end);
        }
    }
}

/// One way to damage a section.
#[derive(Clone, Debug)]
enum Damage {
    Byte(prop::sample::Index, u8),
    Number(prop::sample::Index, u32),
    Cut(prop::sample::Index),
    Remove(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
}

fn damage() -> impl Strategy<Value = Damage> {
    let place = any::<prop::sample::Index>;
    let number = prop_oneof![Just(u32::MAX), Just(0x7fff_ffff), Just(0x1000_0000), 0..100u32];
    prop_oneof![
        (place(), any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        (place(), number).prop_map(|(at, number)| Damage::Number(at, number)),
        place().prop_map(Damage::Cut),
        place().prop_map(Damage::Remove),
        (place(), prop::collection::vec(any::<u8>(), 1..24))
            .prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
    ]
}

impl Damage {
    fn apply(&self, section: &mut Vec<u8>) {
        let length = section.len();
        if length == 0 {
            return;
        }
        match self {
            Self::Byte(at, byte) => section[at.index(length)] = *byte,
            Self::Number(at, number) => {
                let at = at.index(length) / 4 * 4;
                let fits = 4.min(length - at);
                section[at..at + fits].copy_from_slice(&number.to_le_bytes()[..fits]);
            }
            Self::Cut(at) => section.truncate(at.index(length)),
            Self::Remove(at) => drop(section.remove(at.index(length))),
            Self::Insert(at, bytes) => {
                let at = at.index(length);
                section.splice(at..at, bytes.iter().copied());
            }
        }
    }
}

proptest! {
    #![proptest_config(corpus::cases(512))]

    #[test]
    fn what_is_written_is_read((models, section) in section()) {
        let read: Vec<_> = tables(&section).map(|table| read(&table.unwrap())).collect();
        prop_assert_eq!(read, models);
        exhaust(&section);
    }

    #[test]
    fn a_section_cut_short_is_an_error_or_whole_tables(
        (models, section) in section(),
        at in any::<prop::sample::Index>(),
    ) {
        let cut = &section[..at.index(section.len() + 1)];
        let mut whole = 0;
        for table in tables(cut) {
            match table {
                Ok(table) => prop_assert_eq!(&read(&table), &models[whole]),
                Err(error) => {
                    let truncated = matches!(error, llvm::Error::Truncated { .. });
                    prop_assert!(truncated, "{}", error);
                    break;
                }
            }
            whole += 1;
        }
        prop_assert!(cut.len() < section.len() || whole == models.len());
    }

    #[test]
    fn damaged_sections_do_no_harm(
        (_, mut section) in section(),
        damages in prop::collection::vec(damage(), 1..6),
    ) {
        damages.iter().for_each(|damage| damage.apply(&mut section));
        exhaust(&section);
    }

    #[test]
    fn damaged_sections_of_llvm_do_no_harm(
        which in 0..3usize,
        damages in prop::collection::vec(damage(), 1..6),
    ) {
        let mut section = CHECKED_IN[which].1.to_vec();
        damages.iter().for_each(|damage| damage.apply(&mut section));
        exhaust(&section);
    }

    #[test]
    fn random_bytes_do_no_harm(
        mut bytes in prop::collection::vec(any::<u8>(), 0..400),
        is_table in any::<bool>(),
    ) {
        if is_table {
            bytes.splice(0..0, [3, 0, 0, 0]);
        }
        exhaust(&bytes);
    }
}

fn error(section: &[u8]) -> llvm::Error {
    let mut tables = tables(section);
    let error = tables.by_ref().find_map(Result::err).expect("an error");
    assert!(tables.next().is_none(), "no table after an error");
    assert!(error.to_string().contains(".llvm_stackmaps at 0x"));
    error
}

#[test]
fn each_error_says_what_and_where() {
    let constant = Location { kind: Kind::ConstantIndex, size: 8, register: 0, value: 0 };
    let record = RecordModel { id: 1, offset: 2, locations: vec![constant; 2], live_outs: vec![] };
    let model = Model { functions: vec![(0, None, vec![record])], constants: vec![7] };
    let mut good = Vec::new();
    write(&model, &mut good);
    write(&model, &mut good);
    let second = good.len() / 2;
    let change = |at: usize, bytes: &[u8]| {
        let mut section = good.clone();
        section[second + at..][..bytes.len()].copy_from_slice(bytes);
        error(&section)
    };
    let record = second + 16 + 24 + 8;
    assert_eq!(change(0, &[4]), llvm::Error::Version { offset: second, found: 4 });
    assert_eq!(error(&good[..second + 3]), llvm::Error::Truncated { offset: second, what: "header" });
    assert_eq!(change(4, &[0xff; 4]), llvm::Error::Truncated { offset: second + 16, what: "functions" });
    assert_eq!(change(8, &[0xff; 4]), llvm::Error::Truncated { offset: second + 40, what: "constants" });
    assert_eq!(change(12, &[2]), llvm::Error::Truncated { offset: good.len(), what: "record" });
    assert_eq!(change(16 + 16, &[2]), llvm::Error::Counts { offset: second, records: 1 });
    assert_eq!(change(16 + 16, &[0xff; 8]), llvm::Error::Counts { offset: second, records: 1 });
    assert_eq!(
        change(48 + 14, &[0xff; 2]),
        llvm::Error::Truncated { offset: record + 16, what: "locations" }
    );
    assert_eq!(change(48 + 16 + 12, &[6]), llvm::Error::Kind { offset: record, found: 6 });
    assert_eq!(change(48 + 16 + 8, &[1]), llvm::Error::Constant { offset: record, index: 1 });
    assert_eq!(change(48 + 16 + 11, &[0x80]), llvm::Error::Constant { offset: record, index: 1 << 31 });
    let live_outs = record + 16 + 2 * 12 + 2;
    assert_eq!(
        change(live_outs - second, &[9]),
        llvm::Error::Truncated { offset: live_outs + 2, what: "live-outs" }
    );
}

/// The map, or why there is none, of one statepoint with these locations after its three constants.
fn describe(deopts: &[Location], live: &[Location]) -> Option<Result<FrameMap, Reason>> {
    let constant = |value| Location { kind: Kind::Constant, size: 8, register: 0, value };
    let head = [constant(0), constant(0), constant(deopts.len() as i32)];
    let locations = [&head[..], deopts, live].concat();
    let record = RecordModel { id: 1, offset: 0x20, locations, live_outs: vec![] };
    let model = Model { functions: vec![(0x1000, Some(0x40), vec![record])], constants: vec![] };
    let mut section = Vec::new();
    write(&model, &mut section);
    let table = tables(&section).next().unwrap().unwrap();
    let map = table.frame_maps(Verdict::Data, |_| true).next()?;
    Some(map.map_err(|unusable| {
        assert_eq!(unusable.return_address, 0x1020);
        unusable.reason
    }))
}

fn at(kind: Kind, register: u16, value: i32, size: u16) -> Location {
    Location { kind, size, register, value }
}

/// What the map says of each of the words it names, by place: the last verdict given.
fn words(map: &FrameMap) -> Vec<(Place, Verdict)> {
    let last: std::collections::BTreeMap<Place, Verdict> = map.words().iter().copied().collect();
    last.into_iter().collect()
}

fn from_rsp(offset: i32, verdict: Verdict) -> (Place, Verdict) {
    (Place::at(Register::RSP, offset), verdict)
}

/// The callee-saved registers of which it says that they are pointers.
fn pointer_registers(map: &FrameMap) -> Vec<Register> {
    let is_pointer = |register: &Register| map.verdict_of(*register) == Some(Verdict::Pointer);
    Register::CALLEE_SAVED.into_iter().filter(is_pointer).collect()
}

#[test]
fn a_vector_of_pointers_is_as_many_words() {
    let vector = at(Kind::Indirect, 7, 16, 24);
    let map = describe(&[], &[vector, vector]).unwrap().unwrap();
    assert_eq!(words(&map), [16, 24, 32].map(|offset| from_rsp(offset, Verdict::Pointer)));
    assert_eq!(map.range(), 0x101f..0x1020);
    assert_eq!(map.verdict_of(Register::R12), Some(Verdict::Data));
}

#[test]
fn a_pointer_wins_over_a_deopt_value_in_the_same_place() {
    let slot = |offset| at(Kind::Indirect, 7, offset, 8);
    let register = |number| at(Kind::Register, number, 0, 8);
    let deopts = [slot(8), slot(16), at(Kind::Indirect, 7, 28, 4), register(12), register(13)];
    let map = describe(&deopts, &[slot(8), slot(8), register(12), register(12)]).unwrap().unwrap();
    assert_eq!(words(&map), [from_rsp(8, Verdict::Pointer), from_rsp(16, Verdict::Ambiguous)]);
    let registers = [Register::R12, Register::R13, Register::R14].map(|one| map.verdict_of(one).unwrap());
    assert_eq!(registers, [Verdict::Pointer, Verdict::Ambiguous, Verdict::Data]);
}

#[test]
fn a_frame_addressed_from_a_register_has_a_pointer_in_it() {
    for base in [Register::RBP, Register::RBX] {
        let slot = at(Kind::Indirect, base.dwarf().into(), -24, 8);
        let map = describe(&[], &[slot, slot]).unwrap().unwrap();
        assert_eq!(words(&map), [(Place::at(base, -24), Verdict::Pointer)]);
        assert_eq!(pointer_registers(&map), [base]);
    }
}

#[test]
fn what_no_frame_can_obey_is_named() {
    let pair = |location: Location| describe(&[], &[location, location]).unwrap().unwrap_err();
    assert_eq!(pair(at(Kind::Register, 0, 0, 8)), Reason::Register(0));
    assert_eq!(pair(at(Kind::Register, 17, 0, 16)), Reason::Register(17));
    assert_eq!(pair(at(Kind::Indirect, 13, 0, 8)), Reason::Base(13));
    assert_eq!(pair(at(Kind::Indirect, 7, 4, 8)), Reason::Place { offset: 4, size: 8 });
    assert_eq!(pair(at(Kind::Indirect, 7, 8, 0)), Reason::Place { offset: 8, size: 0 });
    assert_eq!(pair(at(Kind::Indirect, 7, i32::MAX - 7, 8)), Reason::Place { offset: i32::MAX - 7, size: 8 });
    assert_eq!(pair(at(Kind::Indirect, 7, 1 << 26, 8)), Reason::Place { offset: 1 << 26, size: 8 });
    let huge = vec![at(Kind::Indirect, 7, 0, 65528); 10];
    assert_eq!(describe(&[], &huge).unwrap().unwrap_err(), Reason::Words);
    assert_eq!(describe(&huge, &[]).unwrap().unwrap_err(), Reason::Words);
}

#[test]
fn an_odd_number_of_pointers_is_no_statepoint() {
    assert_eq!(describe(&[], &[at(Kind::Indirect, 7, 8, 8)]), None);
    assert!(describe(&[], &[at(Kind::Direct, 7, 8, 8)]).is_some());
}

/// Sections made by `llc` of LLVM 14 from the files beside them; see `tests/llvm/README.md`.
const CHECKED_IN: [(&str, &[u8]); 3] = [
    ("statepoint", include_bytes!("llvm/statepoint.bin")),
    ("statepoint-registers", include_bytes!("llvm/statepoint-registers.bin")),
    ("patchpoint", include_bytes!("llvm/patchpoint.bin")),
];

fn checked_in(name: &str) -> Vec<FrameMap> {
    let section = CHECKED_IN.iter().find(|(known, _)| *known == name).unwrap().1;
    let table = tables(section).next().unwrap().unwrap();
    table.frame_maps(Verdict::Ambiguous, |id| id >= 7000).map(Result::unwrap).collect()
}

#[test]
fn the_statepoints_checked_in_give_these_maps() {
    let maps = checked_in("statepoint");
    let [pairs, dynamic, realigned] = &maps[..] else { panic!("{maps:?}") };
    let pointer = |offset| from_rsp(offset, Verdict::Pointer);
    // alloca, a, b, derived, i
    let expected = [pointer(8), pointer(24), pointer(32), pointer(40), from_rsp(48, Verdict::Ambiguous)];
    assert_eq!(words(pairs), expected);
    assert!(pointer_registers(pairs).is_empty());
    assert_eq!(words(dynamic), [(Place::at(Register::RBP, -24), Verdict::Pointer)]);
    assert_eq!(words(realigned), [(Place::at(Register::RBX, 56), Verdict::Pointer)]);
    assert_eq!(pointer_registers(realigned), [Register::RBX]);

    let table = tables(CHECKED_IN[0].1).next().unwrap().unwrap();
    let functions: Vec<_> = table.functions().collect();
    assert_eq!(pairs.range().end as u64 - functions[0].address, 45);
    let sizes: Vec<_> = functions.iter().map(|function| function.stack_size).collect();
    assert_eq!(sizes, [Some(56), None, None]);
}

#[test]
fn pointers_in_registers_checked_in_are_found() {
    let maps = checked_in("statepoint-registers");
    let pointers = words(&maps[0]).into_iter().filter(|(_, verdict)| *verdict == Verdict::Pointer);
    assert_eq!(pointers.count(), 1, "the alloca");
    assert_eq!(pointer_registers(&maps[0]).len(), 3);
}

#[test]
fn a_section_is_registered_once() {
    // SAFETY: no code lies at the addresses in the section.
    let recorded = unsafe { llvm::register(CHECKED_IN[0].1, Verdict::Ambiguous) }.unwrap();
    assert!(recorded.unusable.is_empty());
    let address = tables(CHECKED_IN[0].1).next().unwrap().unwrap().functions().next().unwrap().address;
    let source = || map::process().read().find(address as usize + 44).map(|map| (map.source(), map.rules()));
    assert_eq!(source(), Some((Source::Llvm, None)), "words, and no rules");
    // SAFETY: as before, no code lies there.
    let again = unsafe { llvm::register(CHECKED_IN[0].1, Verdict::Ambiguous) }.unwrap_err();
    assert!(matches!(again, llvm::Error::Refused(map::Error::Overlap { .. })), "{again}");
    drop(recorded);
    assert_eq!(source(), None);
    let cut = &CHECKED_IN[0].1[..100];
    // SAFETY: nothing is registered, as is asserted.
    let outcome = unsafe { llvm::register(cut, Verdict::Data) };
    assert!(matches!(outcome, Err(llvm::Error::Truncated { .. })));
}

#[test]
fn patchpoints_and_stackmaps_are_no_frames() {
    assert!(checked_in("patchpoint").is_empty());
    let table = tables(CHECKED_IN[2].1).next().unwrap().unwrap();
    let shapes: Vec<_> =
        table.records().filter(|record| record.statepoint().is_some()).map(|r| r.id()).collect();
    assert_eq!(shapes, [13], "only the disguised one has the shape");
}

/// An `llc` and its flags: the name of the section it makes, the source, the arguments.
const SOURCES: [(&str, &str, &[&str]); 3] = [
    ("statepoint", "statepoint", &[]),
    ("statepoint-registers", "statepoint", &["-fixup-allow-gcptr-in-csr", "-max-registers-for-gc-values=4"]),
    ("patchpoint", "patchpoint", &[]),
];

/// The names that the `llc`s of this machine go by, less `llc`.
fn llvms() -> Vec<String> {
    let versions = (14..40).map(|version| format!("-{version}"));
    let found = |suffix: &String| Command::new(format!("llc{suffix}")).arg("--version").output().is_ok();
    std::iter::once(String::new()).chain(versions).filter(found).collect()
}

fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// What `llc` makes of a source, in a file of the test's own.
fn compile(test: &str, suffix: &str, (name, source, arguments): (&str, &str, &[&str])) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/llvm/{source}.ll"));
    let object = scratch(&format!("{test}-{name}{suffix}.o"));
    let mut llc = Command::new(format!("llc{suffix}"));
    llc.args(["-filetype=obj", "-relocation-model=pic"]).args(arguments).arg(source).arg("-o").arg(&object);
    let output = llc.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    object
}

/// A section's bytes with its 64-bit relocations applied, the text being at `text`.
fn relocated(file: &object::File<'_>, name: &str, text: u64) -> Vec<u8> {
    let section = file.section_by_name(name).unwrap();
    let mut bytes = section.data().unwrap().to_vec();
    for (at, relocation) in section.relocations() {
        let object::RelocationTarget::Symbol(symbol) = relocation.target() else { panic!("{relocation:?}") };
        assert_eq!((relocation.kind(), relocation.size()), (object::RelocationKind::Absolute, 64));
        let value = file.symbol_by_index(symbol).unwrap().address() + text;
        bytes[at as usize..][..8]
            .copy_from_slice(&value.wrapping_add_signed(relocation.addend()).to_le_bytes());
    }
    bytes
}

/// The table as `llvm-readobj --stackmap` prints it, from the first line about the table on.
fn as_readobj(section: &[u8]) -> String {
    let table = tables(section).next().unwrap().unwrap();
    let constants: Vec<_> = table.constants().collect();
    let mut text = format!("LLVM StackMap Version: 3\nNum Functions: {}\n", table.functions().len());
    for function in table.functions() {
        let (address, size) = (function.address, function.stack_size.unwrap_or(u64::MAX));
        writeln!(
            text,
            "  Function address: {address}, stack size: {size}, callsite record count: {}",
            function.records
        )
        .unwrap();
    }
    writeln!(text, "Num Constants: {}", constants.len()).unwrap();
    for (index, constant) in constants.iter().enumerate() {
        writeln!(text, "  #{}: {constant}", index + 1).unwrap();
    }
    writeln!(text, "Num Records: {}", table.records().count()).unwrap();
    for record in table.records() {
        writeln!(text, "  Record ID: {}, instruction offset: {}", record.id(), record.offset()).unwrap();
        writeln!(text, "    {} locations:", record.locations().len()).unwrap();
        for (index, Location { kind, size, register, value }) in record.locations().enumerate() {
            let place = match kind {
                Kind::Register => format!("Register R#{register}"),
                Kind::Direct => format!("Direct R#{register} + {value}"),
                Kind::Indirect => format!("Indirect [R#{register} + {value}]"),
                Kind::Constant => format!("Constant {}", value as u32),
                Kind::ConstantIndex => format!("ConstantIndex #{value} ({})", constants[value as usize]),
            };
            writeln!(text, "      #{}: {place}, size: {size}", index + 1).unwrap();
        }
        let outs = record.live_outs().map(|out| format!("R#{} ({}-bytes) ", out.register, out.size));
        writeln!(text, "    {} live-outs: [ {}]", record.live_outs().len(), outs.collect::<String>())
            .unwrap();
    }
    text
}

#[test]
fn llvm_readobj_reads_the_same() {
    for suffix in llvms() {
        for source in SOURCES {
            let object = compile("readobj", &suffix, source);
            let readobj =
                Command::new(format!("llvm-readobj{suffix}")).arg("--stackmap").arg(&object).output();
            let data = std::fs::read(object).unwrap();
            let file = object::File::parse(&*data).unwrap();
            let section = file.section_by_name(".llvm_stackmaps").unwrap().data().unwrap();
            exhaust(section);
            let Ok(readobj) = readobj else { continue };
            let theirs = String::from_utf8(readobj.stdout).unwrap();
            let theirs = &theirs[theirs.find("LLVM StackMap").unwrap()..];
            assert_eq!(as_readobj(section).trim(), theirs.trim());
            println!("llc{suffix}: {} agrees with llvm-readobj{suffix}", source.0);
        }
    }
}

/// The text of an object file in place, with calls led to the callee; and its unwind tables, registered.
fn load(file: &object::File<'_>) -> (recorded::Code, Registration<'static>) {
    let text = file.section_by_name(".text").unwrap();
    let unwind = file.section_by_name(".eh_frame").unwrap();
    let (bytes, tables) = (text.data().unwrap(), unwind.data().unwrap());
    let thunk = bytes.len().next_multiple_of(16);
    let unwind_at = thunk + 16;
    let code = recorded::Code::new(unwind_at + tables.len(), |_, memory| {
        memory[..bytes.len()].copy_from_slice(bytes);
        memory[unwind_at..].copy_from_slice(tables);
        // jmp [rip + 0], and where to
        memory[thunk..][..6].copy_from_slice(&[0xff, 0x25, 0, 0, 0, 0]);
        memory[thunk + 6..][..8].copy_from_slice(&(recorded::callee as *const () as u64).to_le_bytes());
        let in_text = text.relocations().map(|(at, relocation)| (at as usize, relocation));
        let in_tables = unwind.relocations().map(|(at, relocation)| (unwind_at + at as usize, relocation));
        for (at, relocation) in in_text.chain(in_tables) {
            assert_eq!(relocation.size(), 32);
            let object::RelocationTarget::Symbol(symbol) = relocation.target() else {
                panic!("{relocation:?}")
            };
            let symbol = file.symbol_by_index(symbol).unwrap();
            // `fill` wants a buffer written, which may as well stay as it is: its thunk is a `ret`.
            let target = match symbol.name().unwrap() {
                "callee" => thunk,
                "fill" => thunk + 15,
                _ if symbol.section_index() == Some(text.index()) => symbol.address() as usize,
                other => panic!("a call to {other}"),
            };
            let distance = (target as i64 + relocation.addend() - at as i64) as i32;
            memory[at..][..4].copy_from_slice(&distance.to_le_bytes());
        }
        memory[thunk + 15] = 0xc3;
    });
    // SAFETY: the compiler's section, relocated for where it lies; it goes after the registration.
    let registration = unsafe { map::register_eh_frame(&code.bytes()[unwind_at..]) }.unwrap();
    (code, registration)
}

#[test]
fn code_of_llvm_goes_on_with_the_moved_pointers_and_no_others() {
    type Four = extern "C" fn(*mut usize, *mut usize, usize, u32) -> usize;
    for suffix in llvms() {
        for source in &SOURCES[..2] {
            let data = std::fs::read(compile("run", &suffix, *source)).unwrap();
            let file = object::File::parse(&*data).unwrap();
            let (code, _unwind) = load(&file);
            let section = relocated(&file, ".llvm_stackmaps", code.address() as u64);
            // SAFETY: the compiler's section, with the addresses of the code, which goes after the registration.
            let recorded = unsafe { llvm::register(&section, Verdict::Ambiguous) }.unwrap();
            assert!(recorded.unusable.is_empty());
            let functions: Vec<_> = tables(&section).next().unwrap().unwrap().functions().collect();
            assert_eq!(functions.len(), 3);
            for name in ["pairs", "dynamic", "realigned"] {
                let symbol = file.symbols().find(|symbol| symbol.name() == Ok(name)).unwrap();
                let entry = code.address() + symbol.address() as usize;
                // SAFETY: the code is mapped and has at most these parameters; `callee` and `fill` suit it.
                let function = unsafe { core::mem::transmute::<*const (), Four>(entry as *const ()) };
                let (result, stops) = recorded::run(recorded::Objects::new(), |old| {
                    // pairs(a, b, i, j); the others are (a, n)
                    let second = if name == "pairs" {
                        old.wrapping_add(4)
                    } else {
                        core::ptr::without_provenance_mut(64)
                    };
                    function(old, second, 2, 7)
                });
                let [stop] = &stops[..] else { panic!("{stops:?}") };
                let what = format!("{suffix} {} {name}: {stop:?}", source.0);
                assert_eq!(stop.source, Source::Llvm, "{what}");
                // LLVM's own idea of the frame's size, which unwind tables gave here.
                let function = functions.iter().find(|function| function.address == entry as u64).unwrap();
                assert_eq!(function.stack_size.unwrap_or(stop.size as u64), stop.size as u64, "{what}");
                let moved = stop.words + stop.registers;
                if name == "pairs" {
                    // a = 1, b = 5, derived = a + 2, and what was stored in the alloca = a
                    assert_eq!((result, moved), (1_003_005_001, 4), "{what}");
                } else {
                    assert_eq!((result, moved), (1, 1), "{what}");
                }
            }
        }
        println!("llc{suffix}: ran");
    }
}

#[test]
fn a_linker_joins_tables() {
    for suffix in llvms() {
        let joined = scratch(&format!("joined{suffix}.o"));
        let parts = [0, 2].map(|source| compile("join", &suffix, SOURCES[source]));
        let Ok(status) = Command::new("ld").arg("-r").args(&parts).arg("-o").arg(&joined).status() else {
            return;
        };
        assert!(status.success());
        let data = std::fs::read(joined).unwrap();
        let file = object::File::parse(&*data).unwrap();
        let section = relocated(&file, ".llvm_stackmaps", 0);
        let functions: Vec<_> = tables(&section).map(|table| table.unwrap().functions().len()).collect();
        assert_eq!(functions, [3, 2]);
        for (function, record) in
            tables(&section).flat_map(|table| table.unwrap().sites().collect::<Vec<_>>())
        {
            let symbol =
                file.symbols().find(|symbol| symbol.size() > 0 && symbol.address() == function.address);
            let symbol = symbol.unwrap_or_else(|| panic!("no function at {:#x}", function.address));
            assert!(u64::from(record.offset()) < symbol.size());
        }
    }
}

/// As the documentation of `llvm::register` says: a renamed section, its ends found by symbols that the linker makes.
#[test]
fn a_renamed_section_is_found_by_the_symbols_of_the_linker() {
    const SHIM: &str = "extern const char __start_llvm_stackmaps[], __stop_llvm_stackmaps[];
        const char *const bounds[] = { __start_llvm_stackmaps, __stop_llvm_stackmaps };
        void callee(long n) {} void fill(char *p) {}";
    for suffix in llvms() {
        let object = compile("renamed", &suffix, SOURCES[0]);
        let rename = "llvm_stackmaps,alloc,load,data,contents";
        let renamed = Command::new("objcopy")
            .args(["--rename-section", &format!(".llvm_stackmaps={rename}")])
            .arg(&object)
            .status();
        let (shim, library) =
            (scratch(&format!("shim{suffix}.c")), scratch(&format!("librenamed{suffix}.so")));
        std::fs::write(&shim, SHIM).unwrap();
        let linked = Command::new("cc")
            .args(["-shared", "-fPIC", "-w", "-o"])
            .args([&library, &shim, &object])
            .status();
        let (Ok(renamed), Ok(linked)) = (renamed, linked) else { return };
        assert!(renamed.success() && linked.success());
        let path = std::ffi::CString::new(library.to_str().unwrap()).unwrap();
        // SAFETY: loads what was linked above, which has these symbols, and never unloads it.
        let (section, pairs) = unsafe {
            let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
            assert!(!handle.is_null(), "{:?}", std::ffi::CStr::from_ptr(libc::dlerror()));
            let bounds = *libc::dlsym(handle, c"bounds".as_ptr()).cast::<[*const u8; 2]>();
            let length = bounds[1].addr() - bounds[0].addr();
            (std::slice::from_raw_parts(bounds[0], length), libc::dlsym(handle, c"pairs".as_ptr()).addr())
        };
        map::record_loaded_objects();
        // SAFETY: the section of this program's own code, which stays.
        let recorded = unsafe { llvm::register(section, Verdict::Ambiguous) }.unwrap();
        assert!(recorded.unusable.is_empty());
        let reader = map::process().read();
        let site = tables(section).next().unwrap().unwrap().sites().next().unwrap();
        assert_eq!(site.0.address, pairs as u64);
        let map = reader.find(pairs + site.1.offset() as usize - 1).unwrap();
        assert_eq!(map.source(), Source::Llvm);
        let size = site.0.stack_size.unwrap() as i32;
        assert_eq!(map.rules(), Some(Ok(map::Rules::new(map::Cfa::rsp(size + 8)))));
    }
}

/// With `REGROW_BLESS` set, makes the sections checked in anew, the text being at 0x40_0000.
#[test]
fn bless() {
    if std::env::var_os("REGROW_BLESS").is_none() {
        return;
    }
    for source in SOURCES {
        let data = std::fs::read(compile("bless", "-14", source)).unwrap();
        let section = relocated(&object::File::parse(&*data).unwrap(), ".llvm_stackmaps", 0x40_0000);
        let to = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/llvm/{}.bin", source.0));
        std::fs::write(to, section).unwrap();
    }
}
