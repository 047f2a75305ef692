//! Reading the maps that `asm/frame_map.inc` has put into the section `regrow_frame_maps` of the program.
//!
//! The macros' file draws the format. Linkers make symbols for the start and the end of a section whose name is an identifier, and by
//! these the section is found. They are weak, so a program without the section links too.

use core::arch::asm;
use core::slice;

use super::frame_map::{Cfa, FrameMap, Place, Register, Rules, Source, Verdict};

const MAGIC: u32 = u32::from_le_bytes(*b"rfm1");
/// The number that stands for the CFA where a register is expected.
const CFA: u8 = 16;
const WORD: i64 = size_of::<usize>() as i64;

/// A place in the section that does not hold what the macros write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Malformed {
    /// Offset in the section.
    pub offset: usize,
}

/// The section of this program, or of the shared object that this crate was linked into. Empty if there is none.
pub(super) fn section() -> &'static [u8] {
    let (start, stop): (usize, usize);
    // SAFETY: loads two addresses from the global offset table; undefined weak symbols have address 0.
    unsafe {
        asm!(
            ".weak __start_regrow_frame_maps",
            ".weak __stop_regrow_frame_maps",
            "mov {start}, [rip + __start_regrow_frame_maps@GOTPCREL]",
            "mov {stop}, [rip + __stop_regrow_frame_maps@GOTPCREL]",
            start = out(reg) start,
            stop = out(reg) stop,
            options(nostack, preserves_flags, pure, readonly),
        );
    }
    if start == 0 || stop <= start {
        return &[];
    }
    // SAFETY: the linker's bounds of a section that is loaded, constant, and stays as long as this code does.
    unsafe { slice::from_raw_parts(start as *const u8, stop - start) }
}

/// The maps in a section that lies at `address`.
pub(super) fn parse(section: &[u8], address: usize) -> Result<Vec<FrameMap>, Malformed> {
    let mut reader = Reader { section, address, offset: 0 };
    let mut maps = Vec::new();
    while reader.skip_padding() {
        let offset = reader.offset;
        maps.push(reader.map().ok_or(Malformed { offset })?);
    }
    Ok(maps)
}

struct Reader<'a> {
    section: &'a [u8],
    address: usize,
    offset: usize,
}

impl Reader<'_> {
    /// Goes to the next map; false at the end. Between the sections of several files, linkers put zero bytes.
    fn skip_padding(&mut self) -> bool {
        let rest = self.section.get(self.offset..).unwrap_or_default();
        match rest.iter().position(|&byte| byte != 0) {
            Some(zeros) => {
                self.offset += zeros;
                true
            }
            None => false,
        }
    }

    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = self.section.get(self.offset..)?.first_chunk()?;
        self.offset += N;
        Some(*bytes)
    }

    fn long(&mut self) -> Option<i32> {
        self.bytes().map(i32::from_le_bytes)
    }

    fn map(&mut self) -> Option<FrameMap> {
        if self.long()? as u32 != MAGIC {
            return None;
        }
        let here = self.address.checked_add(self.offset)?;
        let start = here.checked_add_signed(self.long()? as isize)?;
        let end = start.checked_add(self.long()? as u32 as usize)?;
        let mut map = FrameMap::new(start..end).source(Source::Assembly);
        while let Some(item) = self.item()? {
            map = item.add_to(map)?;
        }
        Some(map)
    }

    /// The next item; `Some(None)` at the end of the map.
    fn item(&mut self) -> Option<Option<Item>> {
        let [kind, register, count0, count1] = self.bytes()?;
        let value = self.long()?;
        let count = u16::from_le_bytes([count0, count1]);
        Some((kind != 0).then_some(Item { kind, register, count, value }))
    }
}

struct Item {
    kind: u8,
    register: u8,
    count: u16,
    value: i32,
}

impl Item {
    fn add_to(&self, map: FrameMap) -> Option<FrameMap> {
        Some(match self.kind {
            1 => map.rules(Rules::new(Cfa::Register(self.register()?, self.value))),
            2 => {
                let place = Place::checked(None, self.value.into())?;
                let rules = map.rules?.ok()?;
                let register = self.callee_saved()?;
                map.rules(rules.saved(register, place))
            }
            3..=5 => {
                let register = if self.register == CFA { None } else { Some(self.register()?) };
                let verdict = verdict(i32::from(self.kind) - 3)?;
                (0..i64::from(self.count)).try_fold(map, |map, word| {
                    let place = Place::checked(register, i64::from(self.value) + word * WORD)?;
                    Some(map.word(place, verdict))
                })?
            }
            6 => map.register(self.callee_saved()?, verdict(self.value)?),
            7 => map.rest(verdict(self.value)?),
            _ => return None,
        })
    }

    fn register(&self) -> Option<Register> {
        Register::from_dwarf(self.register.into())
    }

    fn callee_saved(&self) -> Option<Register> {
        self.register().filter(|register| register.saved_index().is_some())
    }
}

fn verdict(number: i32) -> Option<Verdict> {
    match number {
        0 => Some(Verdict::Ambiguous),
        1 => Some(Verdict::Pointer),
        2 => Some(Verdict::Data),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    std::arch::global_asm!(
        include_str!("../../asm/frame_map.inc"),
        ".text",
        ".globl regrow_test_mapped",
        "regrow_test_mapped:",
        "  push rbp",
        "  mov rbp, rsp",
        "  push rbx",
        "  sub rsp, 40",
        "  call 2f",
        "1: add rsp, 40",
        "  pop rbx",
        "  pop rbp",
        "  ret",
        "2: ret",
        ".globl regrow_test_mapped_end",
        "regrow_test_mapped_end:",
        "  frame_map_return 1b",
        "  frame_map_cfa rbp, 16",
        "  frame_map_saved rbp, -16",
        "  frame_map_saved rbx, -24",
        "  frame_map_words rsp, 0, pointer",
        "  frame_map_words rsp, 8, data, 3",
        "  frame_map_words rbp, -16, ambiguous",
        "  frame_map_words cfa, -32, pointer",
        "  frame_map_register rbx, pointer",
        "  frame_map_end",
        "  frame_map_range 2b, regrow_test_mapped_end",
        "  frame_map_rest data",
        "  frame_map_end",
    );

    unsafe extern "C" {
        fn regrow_test_mapped();
        fn regrow_test_mapped_end();
    }

    fn parsed() -> Vec<FrameMap> {
        parse(section(), section().as_ptr() as usize).unwrap()
    }

    #[test]
    fn what_the_macros_write_is_read() {
        let (start, end) =
            (regrow_test_mapped as *const () as usize, regrow_test_mapped_end as *const () as usize);
        let maps: Vec<_> =
            parsed().into_iter().filter(|map| (start..end).contains(&map.range().start)).collect();
        let rules = Rules::new(Cfa::rbp(16))
            .saved(Register::RBP, Place::cfa(-16))
            .saved(Register::RBX, Place::cfa(-24));
        // push, mov, push, sub, call: 1 + 3 + 1 + 4 + 5 bytes
        let first = FrameMap::at_return(start + 14)
            .rules(rules)
            .word(Place::at(Register::RSP, 0), Verdict::Pointer)
            .word(Place::at(Register::RSP, 8), Verdict::Data)
            .word(Place::at(Register::RSP, 16), Verdict::Data)
            .word(Place::at(Register::RSP, 24), Verdict::Data)
            .word(Place::at(Register::RBP, -16), Verdict::Ambiguous)
            .word(Place::cfa(-32), Verdict::Pointer)
            .register(Register::RBX, Verdict::Pointer)
            .source(Source::Assembly);
        let second = FrameMap::new(end - 1..end).rest(Verdict::Data).source(Source::Assembly);
        assert_eq!(maps, [first, second]);
    }

    proptest! {
        /// A damaged section is an error or other maps, never a panic or an endless loop.
        #[test]
        fn damaged_sections_are_read_within_bounds(
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut section = section().to_vec();
            for (at, byte) in damage {
                let at = at.index(section.len());
                section[at] = byte;
            }
            section.truncate(cut.index(section.len() + 1));
            let _ = parse(&section, 0x1000);
            let _ = parse(&section, usize::MAX);
        }
    }

    #[test]
    fn a_truncated_map_is_an_error() {
        let whole = section();
        let first = whole.iter().position(|&byte| byte != 0).unwrap();
        assert_eq!(parse(&whole[..first + 20], 0x1000_0000), Err(Malformed { offset: first }));
    }
}
