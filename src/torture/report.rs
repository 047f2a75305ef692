//! The findings of a torture: plain data to assert on, and a text to read.

use core::fmt;
use std::collections::HashMap;
use std::ffi::c_void;
use std::path::PathBuf;

use iced_x86::{
    Decoder, DecoderOptions, Formatter, Instruction, InstructionInfoFactory, IntelFormatter, Register,
};

use super::breakpoints;
use super::functions::{holding, loaded_objects, read};
use super::mode::Mode;
use crate::context::{Context, NAMES};
use crate::stack::arena::Slot;
use crate::stack::record::Record;
use crate::stats::WordsByMap;
use crate::switch::RED_ZONE;
use crate::symbol;

/// The byte that fills fresh stack.
pub(super) const POISON: u8 = 0xf5;

/// What a torture did and found.
///
/// ```
/// use regrow::torture::{Mode, Torture};
/// // SAFETY: nothing is kept anywhere.
/// let (_, report) = unsafe { Torture::new(Mode::GrowthPoints).run(|| vec![3, 1, 2].sort()) };
/// assert!(report.is_clean());
/// assert!(report.steps > report.moves && report.words_rewritten > report.moves);
/// println!("{report}");
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// The mode that was requested.
    pub mode: Mode,
    /// Instructions stepped through on a tortured stack.
    pub steps: u64,
    /// Number of moves by the torture.
    pub moves: u64,
    /// Number of growths by overflow, in addition to the moves.
    pub growths: u64,
    /// Bytes copied by the moves.
    pub bytes_copied: u64,
    /// Words in frames and registers that the moves rewrote because they pointed into the stack.
    pub words_rewritten: u64,
    /// The words of frames that the moves and growths looked at, by what the frames' maps say of them.
    pub words_by_map: WordsByMap,
    /// Moves skipped at instructions where pointers need not be whole.
    pub skipped: u64,
    /// Moves that the kernel refused for lack of memory.
    pub refused: u64,
    /// The instructions at which the stack was moved, most frequent first.
    pub hits: Vec<Hit>,
    /// At most one finding, because the first ends the closure.
    pub findings: Vec<Finding>,
}

/// An instruction at which the stack was moved.
///
/// ```
/// use regrow::torture::{Hit, Mode, Torture};
/// // SAFETY: nothing is kept anywhere.
/// let (_, report) = unsafe { Torture::new(Mode::Every(1)).run(|| format!("{:?}", 0.5)) };
/// let Hit { pc, moves, .. } = report.hits[0];
/// println!("most often at {pc:#x}: {moves} times");
/// assert_eq!(report.hits.iter().map(|hit| hit.moves).sum::<u64>(), report.moves);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Hit {
    /// Its address; 0 counts the moves for which the table had no room.
    pub pc: usize,
    /// Number of moves.
    pub moves: u64,
}

/// A use of a pointer that a move has broken.
///
/// ```
/// use regrow::torture::{Kind, Mode, Torture};
/// #[inline(never)]
/// fn sum(references: &[&u32]) -> u32 {
///     references.iter().map(|number| std::hint::black_box(**number)).sum()
/// }
/// // SAFETY: it keeps pointers to its stack on the heap; the report is about that.
/// let (_, report) = unsafe {
///     Torture::new(Mode::GrowthPoints).run(|| {
///         let numbers = std::hint::black_box([1, 2, 3]);
///         sum(&numbers.iter().collect::<Vec<_>>())
///     })
/// };
/// let finding = &report.findings[0];
/// assert_eq!((finding.kind, finding.on_another_thread), (Kind::Stale, false));
/// assert!(finding.instruction.contains(finding.register.unwrap()), "{report}");
/// assert!(finding.backtrace.contains(&finding.function), "{report}");
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Finding {
    /// The kind of bad pointer.
    pub kind: Kind,
    /// The address of the instruction that used the pointer.
    pub pc: usize,
    /// The instruction, in Intel's syntax.
    pub instruction: String,
    /// The function that contains the instruction, or into which it was inlined.
    pub function: String,
    /// The instruction's source file, if the program has line tables.
    pub file: Option<PathBuf>,
    /// The instruction's source line.
    pub line: Option<u32>,
    /// The register that held the pointer.
    pub register: Option<&'static str>,
    /// The address that was touched.
    pub address: usize,
    /// Bytes from that address up to the stack's outermost frame.
    pub below_top: Option<usize>,
    /// The function whose frame the pointer pointed into; `None` if that frame has returned.
    pub points_into: Option<String>,
    /// True if a thread other than the tortured one used the pointer.
    pub on_another_thread: bool,
    /// The functions active on the tortured stack, innermost first.
    pub backtrace: Vec<String>,
}

/// Kinds of bad pointers.
///
/// ```
/// use regrow::torture::{Kind, Mode, Torture};
/// // SAFETY: it keeps a pointer to its stack on the heap; the report is about that.
/// let (_, report) = unsafe {
///     Torture::new(Mode::Every(1)).run(|| {
///         let number = std::hint::black_box(5);
///         let kept = std::hint::black_box(Box::new(&number));
///         **kept
///     })
/// };
/// let advice = match report.findings[0].kind {
///     Kind::Stale => "keep it on the stack, or box what it points to",
///     Kind::Poison => "write it before you read it",
///     _ => "see what this kind is",
/// };
/// assert!(advice.starts_with("keep"), "{report}");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// It points to where the stack was before a move: it was kept where the relocator does not look.
    Stale,
    /// It was read from stack not written since the last move: from below the red zone, or from an uninitialised variable.
    Poison,
}

impl Report {
    /// True if there is no finding.
    ///
    /// ```
    /// use regrow::torture::{Mode, Torture};
    /// // SAFETY: nothing is kept anywhere.
    /// assert!(unsafe { Torture::new(Mode::Overflows).run(|| ()) }.1.is_clean());
    /// ```
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }

    /// Number of moves in each function, most frequent first. Looks the [`hits`](Self::hits) up in the symbol tables.
    ///
    /// ```
    /// use regrow::torture::{Mode, Torture};
    /// // SAFETY: nothing is kept anywhere.
    /// let (_, report) = unsafe { Torture::new(Mode::GrowthPoints).run(|| format!("{}", 5)) };
    /// let functions = report.functions();
    /// assert!(functions.iter().any(|(name, _)| name.contains("fmt")));
    /// assert_eq!(functions.iter().map(|(_, moves)| moves).sum::<u64>(), report.moves);
    /// ```
    #[must_use]
    pub fn functions(&self) -> Vec<(String, u64)> {
        let objects = loaded_objects();
        let start =
            |pc| objects.iter().find_map(|object| holding(&object.functions, pc)).map_or(pc, |f| f.start);
        let mut starts: HashMap<usize, u64> = HashMap::new();
        for hit in &self.hits {
            *starts.entry(start(hit.pc)).or_default() += hit.moves;
        }
        let mut functions: HashMap<String, u64> = HashMap::new();
        for (start, moves) in starts {
            *functions.entry(function(start)).or_default() += moves;
        }
        let mut functions: Vec<_> = functions.into_iter().collect();
        functions.sort_unstable_by(|(name, moves), (other, others)| others.cmp(moves).then(name.cmp(other)));
        functions
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} steps, {} moves, {} growths, {} bytes copied, {} words rewritten, {} skipped",
            self.mode,
            self.steps,
            self.moves,
            self.growths,
            self.bytes_copied,
            self.words_rewritten,
            self.skipped
        )?;
        match self.findings.as_slice() {
            [] => f.write_str("clean"),
            findings => findings.iter().try_for_each(|finding| finding.fmt(f)),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Stale => f.write_str("stale pointer")?,
            Kind::Poison => f.write_str("pointer read from fresh stack")?,
        }
        let whose = if self.on_another_thread { ", on another thread" } else { "" };
        writeln!(f, " used by {}{whose}", self.function)?;
        if let (Some(file), Some(line)) = (&self.file, self.line) {
            writeln!(f, "  at {}:{line}", file.display())?;
        }
        write!(f, "  {:#x}: {}", self.pc, self.instruction)?;
        if let Some(register) = self.register {
            write!(f, "   ({register})")?;
        }
        writeln!(f)?;
        if let Some(below_top) = self.below_top {
            let into = match &self.points_into {
                Some(function) => format!("the frame of {function}"),
                None => "a frame that has returned".to_string(),
            };
            writeln!(f, "  points into {into}, {below_top} bytes below the top")?;
        }
        for (number, function) in self.backtrace.iter().enumerate() {
            writeln!(f, "  {number:2}: {function}")?;
        }
        Ok(())
    }
}

/// Most frames that are kept.
const FRAMES: usize = 128;

/// A finding as the handler leaves it.
pub(super) struct Found {
    kind: Kind,
    pc: usize,
    address: usize,
    registers: [usize; NAMES.len()],
    /// Start and end of the slot that was touched.
    slot: Option<(usize, usize)>,
    on_another_thread: bool,
    /// The end of the tortured stack's slot, and how far below it the outermost frame is.
    end: usize,
    base_offset: usize,
    /// Each frame's program counter and stack pointer, innermost first.
    frames: [(usize, usize); FRAMES],
    depth: usize,
}

impl Found {
    pub(super) const NOTHING: Self = Self {
        kind: Kind::Stale,
        pc: 0,
        address: 0,
        registers: [0; NAMES.len()],
        slot: None,
        on_another_thread: false,
        end: 0,
        base_offset: 0,
        frames: [(0, 0); FRAMES],
        depth: 0,
    };

    /// Replaces the contents with a finding, in place. Adds no frames, because another thread's signal stack may be small.
    pub(super) fn fill(
        &mut self,
        kind: Kind,
        address: usize,
        slot: Option<Slot>,
        on_another_thread: bool,
        context: &mut Context<'_>,
    ) {
        self.kind = kind;
        self.pc = breakpoints::original(context.rip()).map_or(context.rip(), |(at, _)| at);
        self.address = address;
        self.registers.copy_from_slice(context.general());
        self.slot = slot.map(|slot| (slot.start(), slot.end()));
        self.on_another_thread = on_another_thread;
        self.end = 0;
        self.base_offset = 0;
        self.depth = 0;
    }

    /// Adds the frames of the interrupted stack, which holds `rsp`, and of the stacks it was resumed from. Called in the
    /// handler: walking allocates nothing after [`prepare`] has walked once.
    pub(super) fn add_frames(&mut self, rsp: usize) {
        let current = match self.slot {
            // The stack has left the touched slot, and the slot's chain leads to the current one. A slot that is free again has
            // no such chain; then the running stack is meant.
            Some((start, _)) => {
                Slot::containing(start).map(Slot::current).filter(|slot| slot.start() != start)
            }
            None => None,
        };
        if let Some(slot) = current.or_else(|| Slot::containing(rsp)) {
            self.end = slot.end();
            // SAFETY: the record is accessible, because its coroutine runs, or waits for one that runs.
            self.base_offset = usize::from(unsafe { (*Record::at(slot.end())).base_offset });
        }
        let mut inside = false;
        // SAFETY: only one torture runs at a time, so no other code in this crate walks with `backtrace` now.
        unsafe {
            backtrace::trace_unsynchronized(|frame| {
                let (pc, sp) = (frame.ip() as usize, frame.sp() as usize);
                inside |= sp == rsp; // the handler's own frames come first
                if inside && let Some(place) = self.frames.get_mut(self.depth) {
                    *place = (pc, sp);
                    self.depth += 1;
                }
                self.depth < FRAMES
            });
        }
    }

    pub(super) fn resolve(&self) -> Finding {
        let frames = self.frames.get(..self.depth).unwrap_or_default();
        let below_end = self.slot.map(|(_, end)| end - self.address);
        let (file, line) = line(self.pc);
        let (instruction, registers) = disassemble(self.pc);
        Finding {
            kind: self.kind,
            pc: self.pc,
            instruction,
            function: function(self.pc),
            file,
            line,
            register: self.culprit(&registers),
            address: self.address,
            below_top: below_end.and_then(|below| below.checked_sub(self.base_offset)),
            points_into: below_end.and_then(|below| self.owner(frames, self.end.checked_sub(below)?)),
            on_another_thread: self.on_another_thread,
            backtrace: backtrace(frames),
        }
    }

    /// The register that held the bad pointer, preferably one that the instruction used.
    fn culprit(&self, used: &[Register]) -> Option<&'static str> {
        let bad = |value: usize| match self.slot {
            Some((start, end)) => (start..end).contains(&value),
            None => value.abs_diff(self.address) < 1 << 16,
        };
        let named =
            |name: &str| used.iter().any(|register| format!("{register:?}").eq_ignore_ascii_case(name));
        let mut candidates: Vec<_> = (0..NAMES.len()).filter(|&at| bad(self.registers[at])).collect();
        candidates.sort_by_key(|&at| (!named(NAMES[at]), self.registers[at].abs_diff(self.address)));
        candidates.first().map(|&at| NAMES[at])
    }

    /// The function whose frame holds an address: the frame with the highest stack pointer at or below it.
    fn owner(&self, frames: &[(usize, usize)], address: usize) -> Option<String> {
        let innermost_sp = frames.first()?.1;
        let (pc, _) = match frames.iter().rposition(|&(_, sp)| sp <= address && sp >= innermost_sp) {
            Some(at) => frames[at],
            None if address + RED_ZONE >= innermost_sp => frames[0],
            None => return None,
        };
        Some(function(pc.wrapping_sub(1)))
    }
}

/// Does the work that allocates at its first use, so that the handler need not.
pub(super) fn prepare() {
    backtrace::trace(|_| true);
}

/// The functions of the tortured stack and of coroutines resumed on it.
fn backtrace(frames: &[(usize, usize)]) -> Vec<String> {
    let mut names: Vec<_> = frames.iter().map(|&(pc, _)| function(pc.wrapping_sub(1))).collect();
    names.truncate(names.iter().rposition(|name| name == "regrow_entry").unwrap_or(names.len()));
    names
}

/// The source line of the innermost function inlined at `pc`.
fn line(pc: usize) -> (Option<PathBuf>, Option<u32>) {
    let mut place = None;
    // `resolve` expects a return address, which is one past the instruction.
    backtrace::resolve((pc + 1) as *mut c_void, |symbol| {
        if place.is_none() && symbol.lineno().is_some_and(|line| line != 0) {
            place = Some((symbol.filename().map(PathBuf::from), symbol.lineno()));
        }
    });
    place.unwrap_or_default()
}

/// The function at `pc` as compiled, not one inlined there.
fn function(pc: usize) -> String {
    symbol::name(pc).unwrap_or_else(|| format!("{pc:#x}"))
}

/// The instruction at `pc`, and the registers that its memory operands use.
fn disassemble(pc: usize) -> (String, Vec<Register>) {
    const LONGEST: usize = 15;
    let mut bytes = [0; LONGEST];
    let length = read(pc, &mut bytes); // less near the end of a mapping
    let bytes = bytes.get(..length).unwrap_or_default();
    let instruction: Instruction = Decoder::with_ip(64, bytes, pc as u64, DecoderOptions::NONE).decode();
    let mut text = String::new();
    IntelFormatter::new().format(&instruction, &mut text);
    let used = InstructionInfoFactory::new()
        .info(&instruction)
        .used_memory()
        .iter()
        .flat_map(|memory| [memory.base(), memory.index()])
        .collect();
    (text, used)
}
