//! The frames of a suspended coroutine: a table when printed, plain data for programs.
//!
//! ```text
//!   base ┌───────────────┐ depth 0
//!        │ first frame   │ frames[n - 1]: the function it was made with, and what that is called by
//!        ├───────────────┤
//!        │ ...           │
//!        ├───────────────┤
//!        │ frames[0]     │ the one that suspended
//!   sp   └───────────────┘ depth = used
//! ```
//!
//! The frames lie end to end: their sizes add up to the used bytes. Their words are judged
//! as a move would judge them (src/grow/obey.rs). Nothing here runs in the fault handler.

use core::fmt;
use core::ops::Add;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::map::{self, End, Kind, Source, Stuck, Verdict, Walk, Word};
use crate::not_moved;
use crate::settings::Growth;
use crate::stack::record::Record;
use crate::stats::Stats;
use crate::switch::{self, Base};
use crate::symbol;

const WORD: usize = size_of::<usize>();

/// The stack of a coroutine, frame by frame; see [`Coroutine::frames`](crate::Coroutine::frames).
///
/// Printed, it is a table with a line for each frame, innermost first. With `{:#}`, inlined functions have their own lines.
///
/// ```
/// use regrow::frames::State;
/// use regrow::{Builder, Yielder};
///
/// #[inline(never)]
/// fn deeper(yielder: &Yielder<(), ()>) {
///     yielder.suspend(());
///     std::hint::black_box(());
/// }
/// let mut coroutine = Builder::new().name("diver").spawn(|yielder: &Yielder<(), ()>, ()| deeper(yielder));
/// assert_eq!(coroutine.frames().state, State::NotStarted);
/// coroutine.resume(());
///
/// let frames = coroutine.frames();
/// let names: Vec<_> = frames.frames.iter().filter_map(|frame| frame.function()).collect();
/// assert!(names.iter().any(|function| function.name.ends_with("deeper")));
/// assert!(frames.to_string().starts_with("coroutine \"diver\", suspended"));
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Frames {
    /// The coroutine's name.
    pub name: Option<String>,
    /// Its state.
    pub state: State,
    /// How its stack grows.
    pub growth: Growth,
    /// The size of its stack in bytes.
    pub size: usize,
    /// Bytes in use: from where the coroutine suspended up to the base.
    pub used: usize,
    /// The frames, innermost first.
    pub frames: Vec<Frame>,
    /// Where the walk ended: at the base, or at a frame that it could not get past.
    /// That frame and those further out are not among [`frames`](Self::frames).
    pub end: End,
    /// The functions at the program counter where the walk stopped early, as in [`Frame::functions`].
    pub stuck_in: Vec<Function>,
}

/// The state of a coroutine.
///
/// ```
/// use regrow::frames::State;
/// let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|yielder, ()| yielder.suspend(()));
/// assert_eq!(coroutine.frames().state, State::NotStarted);
/// coroutine.resume(());
/// assert_eq!(coroutine.frames().state, State::Suspended);
/// coroutine.resume(());
/// assert_eq!(coroutine.frames().state, State::Finished);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum State {
    /// It was never resumed: its stack is empty.
    NotStarted,
    /// It has frames.
    Suspended,
    /// It has frames, in a block. Thaw it to see them.
    Frozen,
    /// Its code switched to another stack (as `stacker::grow` does) and suspended
    /// there. It has frames on both, which cannot be told apart from outside.
    OnAnotherStack,
    /// It runs, or waits for a coroutine that it has resumed. Only destructors of
    /// thread-locals see this state, when `exit` is called inside the coroutine and runs them.
    Running,
    /// It has ended and has no stack.
    Finished,
}

/// One frame.
///
/// ```
/// use regrow::frames::Frame;
/// # use regrow::{Coroutine, Yielder};
/// # #[inline(never)]
/// # fn reads(yielder: &Yielder<(), ()>) {
/// #     let buffer = std::hint::black_box([0u8; 1000]);
/// #     yielder.suspend(());
/// #     std::hint::black_box(buffer);
/// # }
/// # let mut coroutine = Coroutine::new(|yielder: &Yielder<(), ()>, ()| reads(yielder));
/// # coroutine.resume(());
/// // Suspended in `reads`, which has a buffer of 1000 bytes.
/// let frames = coroutine.frames();
/// let largest: &Frame = frames.frames.iter().max_by_key(|frame| frame.size).unwrap();
/// assert!(largest.size > 1000 && largest.depth <= frames.used);
/// assert!(largest.function().is_some_and(|function| function.name.ends_with("reads")));
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Frame {
    /// Bytes from the base down to the frame's lowest: the used part of the stack when this was the innermost frame.
    pub depth: usize,
    /// Its size in bytes.
    pub size: usize,
    /// Where its code continues.
    pub pc: usize,
    /// An address inside the instruction that runs next, or inside the call that has not returned: `pc` or one less.
    pub code: usize,
    /// The functions that its code belongs to. The last is the one that was called; those before it were inlined
    /// into it, innermost first. At most one without the feature `backtrace`; empty if nothing is known.
    pub functions: Vec<Function>,
    /// Its words, lowest first.
    pub cells: Vec<Cell>,
    /// Who recorded the facts about its words.
    pub source: Source,
}

/// A function, and where in it.
///
/// ```
/// use regrow::frames::Function;
/// let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|yielder, ()| yielder.suspend(()));
/// coroutine.resume(());
/// // The name, where it is in the source if that is known, and what was inlined into it.
/// for frame in coroutine.frames().frames {
///     let mut functions = frame.functions.iter().rev().map(Function::to_string);
///     println!("{}", functions.next().unwrap_or("?".to_owned()));
///     functions.for_each(|inlined| println!("    inlined: {inlined}"));
/// #   for function in &frame.functions {
/// #       assert!(function.to_string().starts_with(&function.name));
/// #       assert!(function.line.is_none_or(|line| line > 0));
/// #   }
/// }
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub struct Function {
    /// Its name, demangled.
    pub name: String,
    /// The source file; known only with the feature `backtrace`.
    pub file: Option<PathBuf>,
    /// The line in it, from 1.
    pub line: Option<u32>,
}

/// One word of a frame.
///
/// ```
/// use regrow::frames::Cell;
/// use regrow::map::{Verdict, Word};
/// # use regrow::{Coroutine, Yielder};
/// # let mut coroutine = Coroutine::new(|yielder: &Yielder<(), ()>, ()| {
/// #     let number = std::hint::black_box(1);
/// #     let references = [&number; 4];
/// #     let references = std::hint::black_box(&references);
/// #     yielder.suspend(());
/// #     *references[0]
/// # });
/// # coroutine.resume(());
/// // What a move would rewrite although no map says that it is a pointer.
/// let by_value = |cell: &&Cell| cell.inside && cell.word == Word::Own(Verdict::Ambiguous);
/// let frames = coroutine.frames();
/// let count = frames.frames.iter().flat_map(|frame| &frame.cells).filter(by_value).count();
/// assert!((4..=frames.words().ambiguous).contains(&count));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cell {
    /// The word's owner, and the verdict on the word.
    pub word: Word,
    /// Its value, as an address, lies in this stack or its guard.
    pub inside: bool,
}

/// The number of words of each kind.
///
/// ```
/// use regrow::frames::Words;
/// let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|yielder, ()| yielder.suspend(()));
/// coroutine.resume(());
/// let frames = coroutine.frames();
/// // Compilers' unwind tables show where registers and return addresses are, and nothing about the other words.
/// let Words { pointers, ambiguous, return_addresses, .. } = frames.words();
/// assert_eq!(return_addresses, frames.frames.len());
/// assert!(ambiguous > pointers);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Words {
    /// Pointers, by their map.
    pub pointers: usize,
    /// Data, by their map.
    pub data: usize,
    /// Words that no map describes.
    pub ambiguous: usize,
    /// Registers kept for callers.
    pub saved: usize,
    /// Return addresses.
    pub return_addresses: usize,
    /// How many of all these words hold a value that lies in the stack.
    pub inside: usize,
}

/// `+` adds the counts of parts.
///
/// ```
/// use regrow::frames::{Frame, Words};
/// # let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|yielder, ()| yielder.suspend(()));
/// # coroutine.resume(());
/// let frames = coroutine.frames();
/// let (inner, outer) = frames.frames.split_at(frames.frames.len() / 2);
/// let sum = |part: &[Frame]| part.iter().map(Frame::words).fold(Words::default(), |sum, words| sum + words);
/// assert_eq!(sum(inner) + sum(outer), frames.words());
/// ```
impl Words {
    /// Counts `cells`.
    ///
    /// ```
    /// use regrow::frames::{Cell, Words};
    /// use regrow::map::{Verdict, Word};
    /// let cells = [
    ///     Cell { word: Word::Own(Verdict::Pointer), inside: true },
    ///     Cell { word: Word::ReturnAddress, inside: false },
    /// ];
    /// let expected = Words { pointers: 1, return_addresses: 1, inside: 1, ..Words::default() };
    /// assert_eq!(Words::of(&cells), expected);
    /// ```
    #[must_use]
    pub fn of(cells: &[Cell]) -> Self {
        let mut words = Self::default();
        for cell in cells {
            *match cell.word {
                Word::ReturnAddress => &mut words.return_addresses,
                Word::Saved(_) => &mut words.saved,
                Word::Own(Verdict::Pointer) => &mut words.pointers,
                Word::Own(Verdict::Data) => &mut words.data,
                Word::Own(Verdict::Ambiguous) => &mut words.ambiguous,
            } += 1;
            words.inside += usize::from(cell.inside);
        }
        words
    }

    /// The number of these words.
    ///
    /// ```
    /// let words = regrow::frames::Words { data: 2, saved: 1, inside: 1, ..Default::default() };
    /// assert_eq!(words.total(), 3);
    /// ```
    #[must_use]
    pub fn total(&self) -> usize {
        self.pointers + self.data + self.ambiguous + self.saved + self.return_addresses
    }

    fn columns(&self) -> [usize; 6] {
        [self.pointers, self.data, self.ambiguous, self.saved, self.return_addresses, self.inside]
    }
}

impl Add for Words {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            pointers: self.pointers + other.pointers,
            data: self.data + other.data,
            ambiguous: self.ambiguous + other.ambiguous,
            saved: self.saved + other.saved,
            return_addresses: self.return_addresses + other.return_addresses,
            inside: self.inside + other.inside,
        }
    }
}

/// ```
/// let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|yielder, ()| yielder.suspend(()));
/// coroutine.resume(());
/// for frame in coroutine.frames().frames {
///     let name = frame.function().map_or("?", |function| &function.name);
///     println!("{name}: {} words, {} of them ambiguous", frame.words().total(), frame.words().ambiguous);
/// #   assert_eq!(frame.words().total() * 8, frame.size);
/// }
/// ```
impl Frame {
    /// The function whose frame it is. Functions inlined into it share the frame.
    ///
    /// ```
    /// let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|yielder, ()| yielder.suspend(()));
    /// coroutine.resume(());
    /// let frames = coroutine.frames();
    /// // Even with inlining, the outermost frame is the one that every coroutine begins with.
    /// let outermost = frames.frames.last().and_then(|frame| frame.function()).unwrap();
    /// assert!(outermost.name.ends_with("entry"), "{outermost}");
    /// ```
    #[must_use]
    pub fn function(&self) -> Option<&Function> {
        self.functions.last()
    }

    /// Its words, counted.
    ///
    /// ```
    /// let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|yielder, ()| yielder.suspend(()));
    /// coroutine.resume(());
    /// let frame = &coroutine.frames().frames[0];
    /// assert_eq!(frame.words().total(), frame.size / 8);
    /// assert_eq!(frame.words().return_addresses, 1);
    /// ```
    #[must_use]
    pub fn words(&self) -> Words {
        Words::of(&self.cells)
    }
}

/// The frames lie end to end.
///
/// ```
/// let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|yielder, ()| yielder.suspend(()));
/// coroutine.resume(());
/// let frames = coroutine.frames();
/// assert_eq!(frames.frames.iter().map(|frame| frame.size).sum::<usize>(), frames.used);
/// ```
impl Frames {
    /// All words, counted.
    ///
    /// ```
    /// let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|yielder, ()| yielder.suspend(()));
    /// coroutine.resume(());
    /// let frames = coroutine.frames();
    /// assert_eq!(frames.words().total(), frames.used / 8);
    /// ```
    #[must_use]
    pub fn words(&self) -> Words {
        self.frames.iter().map(Frame::words).fold(Words::default(), Words::add)
    }

    /// The frames of a coroutine that has ended. Nothing more is known about it.
    pub(crate) fn finished() -> Self {
        Self {
            name: None,
            state: State::Finished,
            growth: Growth::InPlace,
            size: 0,
            used: 0,
            frames: Vec::new(),
            end: End::Base,
            stuck_in: Vec::new(),
        }
    }

    /// The frames of a coroutine that has some but cannot show them.
    pub(crate) fn hidden(state: State, name: Option<&str>, growth: Growth, stats: &Stats) -> Self {
        Self { name: name.map(str::to_owned), state, growth, size: stats.size, ..Self::finished() }
    }

    /// The frames of the coroutine suspended at `sp`.
    ///
    /// # Safety
    /// It is suspended there, on its own stack, or was never resumed, and `base` is its base.
    pub(crate) unsafe fn of_suspended(sp: usize, base: *const Base) -> Self {
        // SAFETY: the coroutine is suspended, so its base and its record are accessible, and no code writes them.
        let (record, fresh) = unsafe { (&*(*base).record(), switch::is_fresh(sp)) };
        let mut all = Self {
            name: record.name.as_deref().map(str::to_owned),
            state: if fresh { State::NotStarted } else { State::Suspended },
            growth: record.settings.growth,
            size: record.stats().size,
            used: base as usize - sp,
            ..Self::finished()
        };
        if fresh {
            return all;
        }
        not_moved::record_unknown_code();
        // SAFETY: the coroutine is suspended at `sp`, and its base is `base`.
        let walked = || unsafe { walk(sp, base) };
        (all.frames, all.end) = walked();
        if let End::Stuck { why: Stuck::NoMap, .. } = all.end {
            map::record_loaded_objects(); // its code may have been loaded since then
            (all.frames, all.end) = walked();
        }
        all.resolve();
        all
    }

    /// Looks up the functions of all frames.
    fn resolve(&mut self) {
        let mut known: HashMap<usize, Vec<Function>> = HashMap::new();
        for frame in &mut self.frames {
            frame.functions = known.entry(frame.code).or_insert_with(|| functions(frame.code)).clone();
        }
        if let End::Stuck { pc, .. } = self.end {
            let code = pc.wrapping_sub(usize::from(!self.frames.is_empty()));
            self.stuck_in = functions(code);
        }
    }
}

/// The frames of the coroutine suspended at `sp`, without names, and how the walk ended.
///
/// # Safety
/// The coroutine is suspended there, and `base` is its base.
unsafe fn walk(sp: usize, base: *const Base) -> (Vec<Frame>, End) {
    let lowest = sp - switch::RED_ZONE;
    let base_address = base as usize;
    let memory = |address: usize| {
        let readable = address >= lowest && address <= base_address + size_of::<Base>() - WORD;
        // SAFETY: the coroutine is suspended, so all bytes from what its suspend wrote to the end of its base are accessible.
        readable.then(|| unsafe { (address as *const usize).read_unaligned() })
    };
    // SAFETY: the coroutine is suspended at `sp`, so its suspend has left its registers there, and its base is accessible.
    let (start, record) = unsafe { (switch::registers_of(sp), (*base).record()) };
    let window = Record::slot(record).map_or(lowest..Record::end(record), |slot| slot.start()..slot.end());

    let mut frames = Vec::new();
    let reader = map::process().read();
    let mut walk = Walk::new(&reader, &start, memory);
    for frame in walk.by_ref() {
        if frame.kind() == Kind::Base {
            return (frames, End::Base);
        }
        let range = frame.range();
        if range.end > base_address {
            // The frame's map puts its end outside the stack, where nothing may be read.
            return (frames, End::Stuck { pc: frame.pc(), why: Stuck::Memory(range.end) });
        }
        let cell = |address| Cell {
            word: frame.word(address),
            inside: memory(address).is_some_and(|value| window.contains(&value)),
        };
        frames.push(Frame {
            depth: base_address - range.start,
            size: range.len(),
            pc: frame.pc(),
            code: frame.code(),
            functions: Vec::new(),
            cells: range.step_by(WORD).map(cell).collect(),
            source: frame.map().source(),
        });
    }
    (frames, walk.end().unwrap_or(End::Outermost))
}

/// The functions that the instruction at `code` belongs to, innermost first.
#[cfg(feature = "backtrace")]
fn functions(code: usize) -> Vec<Function> {
    let mut found = Vec::new();
    // The function takes its argument for a return address.
    backtrace::resolve((code + 1) as *mut core::ffi::c_void, |symbol| {
        found.extend(symbol.name().map(|name| Function {
            name: format!("{name:#}"),
            file: symbol.filename().map(Path::to_path_buf),
            line: symbol.lineno(),
        }));
    });
    match (found.last_mut(), function(code).pop()) {
        // Without other debug information, line tables name functions without their paths.
        (Some(outermost), Some(symbol)) => outermost.name = symbol.name,
        (None, symbol) => found.extend(symbol),
        (Some(_), None) => {}
    }
    found
}

#[cfg(not(feature = "backtrace"))]
use function as functions;

/// The function that the instruction at `code` belongs to, from the symbol tables.
fn function(code: usize) -> Vec<Function> {
    symbol::name(code).map(|name| Function { name, file: None, line: None }).into_iter().collect()
}

impl fmt::Display for Function {
    /// The name, and the last two parts of the file's path with the line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        let Some(file) = &self.file else { return Ok(()) };
        let parent = file.parent().and_then(Path::file_name);
        let parts = parent.into_iter().chain(file.file_name()).map(|part| part.to_string_lossy());
        write!(f, "  {}", parts.collect::<Vec<_>>().join("/"))?;
        self.line.map_or(Ok(()), |line| write!(f, ":{line}"))
    }
}

/// The titles of the table's columns. The last two are left-aligned.
const TITLES: [&str; 11] =
    ["depth", "bytes", "pointer", "data", "ambiguous", "saved", "return", "inside", "pc", "map", "function"];
const NUMBERS: usize = 9;
const INDENT: &str = "  ";

/// The texts of one line of the table, and the lines above it.
struct Line([String; TITLES.len()], Vec<String>);

impl Line {
    fn new(first: [String; 2], words: &Words, last: [String; 3]) -> Self {
        let number = |count: usize| if count == 0 { "·".to_owned() } else { count.to_string() };
        let mut columns = first.into_iter().chain(words.columns().map(number)).chain(last);
        Self(core::array::from_fn(|_| columns.next().unwrap_or_default()), Vec::new())
    }

    fn of(frame: &Frame, with_inlined: bool) -> Self {
        let function = frame.function().map_or_else(|| "?".to_owned(), Function::to_string);
        let mut line = Self::new(
            [frame.depth.to_string(), frame.size.to_string()],
            &frame.words(),
            [format!("{:#x}", frame.pc), frame.source.to_string(), function],
        );
        if with_inlined && let Some((_, inlined)) = frame.functions.split_last() {
            line.1 = inlined.iter().map(|function| format!("┌ {function}")).collect();
        }
        line
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, widths: &[usize; TITLES.len()]) -> fmt::Result {
        let above = INDENT.len() * TITLES.len() + widths[..TITLES.len() - 1].iter().sum::<usize>();
        self.1.iter().try_for_each(|inlined| writeln!(f, "{:above$}{inlined}", ""))?;
        let mut text = String::new();
        for (index, (column, &width)) in self.0.iter().zip(widths).enumerate() {
            let right = index < NUMBERS;
            text += INDENT;
            text += &if right { format!("{column:>width$}") } else { format!("{column:width$}") };
        }
        writeln!(f, "{}", text.trim_end())
    }
}

impl fmt::Display for Frames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "coroutine \"{name}\"")?,
            None => f.write_str("coroutine without a name")?,
        }
        let state = match self.state {
            State::NotStarted => "not started",
            State::Suspended => "suspended",
            State::Frozen => return writeln!(f, ", frozen: thaw it to see its frames"),
            State::OnAnotherStack => {
                return writeln!(f, ", suspended on another stack than its own: its frames are not shown");
            }
            State::Running => return writeln!(f, ", running: its frames are not shown"),
            State::Finished => return writeln!(f, ", finished: its stack has been given back"),
        };
        let growth = match self.growth {
            Growth::InPlace => "grows in place",
            Growth::Relocate => "grows by moving",
        };
        writeln!(f, ", {state}: {} of {} bytes used, {growth}", self.used, self.size)?;
        if self.state == State::NotStarted {
            return Ok(());
        }
        self.write_table(f)?;
        self.write_end(f)
    }
}

/// Printed, they form a table.
///
/// ```
/// let mut coroutine = regrow::Coroutine::<(), (), ()>::new(|yielder, ()| yielder.suspend(()));
/// coroutine.resume(());
/// let frames = coroutine.frames();
/// print!("{frames:#}"); // with inlined functions
/// // A line above, the titles, a line for each frame, and the sums.
/// assert_eq!(frames.to_string().lines().count(), frames.frames.len() + 3);
/// ```
impl Frames {
    fn write_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let frames = self.frames.iter().map(|frame| Line::of(frame, f.alternate()));
        let bytes = self.frames.iter().map(|frame| frame.size).sum::<usize>();
        let end = if self.end == End::Base { "to the base" } else { "not to the base" };
        let count = format!("{} frames, {end}", self.frames.len());
        let total = Line::new(
            ["total".to_owned(), bytes.to_string()],
            &self.words(),
            [String::new(), String::new(), count],
        );
        let titles = Line(TITLES.map(str::to_owned), Vec::new());
        let lines: Vec<_> = [titles].into_iter().chain(frames).chain([total]).collect();
        let width =
            |column: usize| lines.iter().map(|line| line.0[column].chars().count()).max().unwrap_or(0);
        let widths = core::array::from_fn(width);
        lines.iter().try_for_each(|line| line.write(f, &widths))
    }

    fn write_end(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rest = self.frames.last().map_or(self.used, |frame| frame.depth - frame.size);
        match self.end {
            End::Base => Ok(()),
            End::Outermost => {
                writeln!(f, "the last of them has no caller; {rest} bytes further out are not shown")
            }
            End::Stuck { pc, why } => {
                write!(f, "stuck at {pc:#x}, ")?;
                match self.stuck_in.last() {
                    Some(function) => write!(f, "{function}")?,
                    None => f.write_str("in a function without a name")?,
                }
                writeln!(f, ": {why}; {rest} bytes from there to the base are not shown")
            }
        }
    }
}
