//! What a compiler wrote down about one of its frames, in the words of no compiler.
//!
//! A frame is described as it stands while one of its calls is under way:
//!
//! ```text
//!              ┌──────────────────────────┐  CFA: rsp in the caller after this frame has returned
//!              │ return address, not ours │
//!   rsp + size ├──────────────────────────┤
//!              │ saved registers, values  │
//!              │ spilled, stack objects   │
//!          rsp ├──────────────────────────┤  rsp as it will be when the call returns to `return_address`
//!              │ return address           │  below here: the callee
//! ```
//!
//! The recorders ([`llvm`](super::llvm), `cranelift`) say what the compiler said, and add nothing. Where
//! callee-saved registers of the *caller* lie in the frame is not in here: that is unwind data, and those
//! words take the verdict of the frame the registers belong to.

use core::ops::Range;

/// What is known about an 8-byte word.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Verdict {
    /// A pointer, perhaps an interior one: it moves with what it points to. It need not point into
    /// this stack: null, the heap and other stacks are all possible.
    Pointer,
    /// Not a pointer, whatever its value.
    Data,
    /// Unknown: it moves if, and only if, its value lies in the moving stack.
    Ambiguous,
}

/// The register a word's place is counted from, with the value it has when the call returns.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Base {
    /// The stack pointer.
    Rsp,
    /// The frame pointer. Its value is known to the unwinder.
    Rbp,
    /// LLVM's base pointer, in frames that are realigned *and* of dynamic size. Callee-saved, so its
    /// value is known to an unwinder that follows it.
    Rbx,
}

impl Base {
    /// The DWARF number: 7, 6 or 3.
    ///
    /// ```
    /// use regrow::map::recorded::Base;
    /// assert_eq!(Base::from_dwarf(Base::Rbp.dwarf()), Some(Base::Rbp));
    /// ```
    pub const fn dwarf(self) -> u16 {
        match self {
            Self::Rsp => 7,
            Self::Rbp => 6,
            Self::Rbx => 3,
        }
    }

    /// The base with this DWARF number, if it is one.
    ///
    /// ```
    /// use regrow::map::recorded::Base;
    /// assert_eq!(Base::from_dwarf(7), Some(Base::Rsp));
    /// assert_eq!(Base::from_dwarf(0), None); // rax
    /// ```
    pub const fn from_dwarf(register: u16) -> Option<Self> {
        match register {
            7 => Some(Self::Rsp),
            6 => Some(Self::Rbp),
            3 => Some(Self::Rbx),
            _ => None,
        }
    }
}

/// One 8-byte word of a frame.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Word {
    /// What the offset is counted from.
    pub base: Base,
    /// Bytes from the base to the word, a multiple of 8 from `rsp`.
    pub offset: i32,
    /// What the word is.
    pub verdict: Verdict,
}

/// A set of general-purpose registers, by DWARF number.
///
/// ```
/// use regrow::map::recorded::Registers;
/// let mut registers = Registers::default();
/// registers.insert(12);
/// assert!(registers.contains(12) && !registers.contains(13));
/// assert_eq!(registers.iter().collect::<Vec<_>>(), [12]);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Registers(u16);

impl Registers {
    /// Registers a function must give back as it got them: `rbx`, `rbp`, `r12` to `r15`. While a call is
    /// under way no other register of the caller holds anything.
    pub const CALLEE_SAVED: Self = Self(1 << 3 | 1 << 6 | 0xf << 12);

    /// Adds a register. Numbers above 15 are no general-purpose registers and change nothing.
    pub fn insert(&mut self, register: u16) {
        self.0 |= 1u16.checked_shl(register.into()).unwrap_or(0);
    }

    /// Whether the register is in the set.
    pub fn contains(self, register: u16) -> bool {
        self.0 & 1u16.checked_shl(register.into()).unwrap_or(0) != 0
    }

    /// Whether no register is in the set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The numbers of the registers, ascending.
    pub fn iter(self) -> impl Iterator<Item = u16> {
        (0..16).filter(move |&register| self.contains(register))
    }
}

/// A frame while the call that returns to `return_address` is under way.
///
/// Two words may be one and the same place, counted from two bases. A pointer wins then.
///
/// ```
/// use regrow::map::recorded::{Base, Frame, Verdict, Word};
/// let mut frame = Frame::new(0x1000, 0x1020, Verdict::Ambiguous);
/// frame.add(Base::Rsp, 8, Verdict::Ambiguous);
/// frame.add(Base::Rsp, 8, Verdict::Pointer);
/// let frame = frame.finish();
/// assert_eq!(frame.words, [Word { base: Base::Rsp, offset: 8, verdict: Verdict::Pointer }]);
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// The address of the function the frame belongs to.
    pub function: u64,
    /// Where the call returns to: what looks the frame up.
    pub return_address: u64,
    /// Bytes from `rsp` to the word that holds this frame's own return address, where it is the same in every
    /// call. `None` in frames of dynamic size. A check on the unwind data, not a replacement for it.
    pub size: Option<u64>,
    /// The words that something is known about, sorted and each but once.
    pub words: Vec<Word>,
    /// The callee-saved registers that hold pointers.
    pub registers: Registers,
    /// The verdict on every word, and on every callee-saved register, not named above:
    /// [`Data`](Verdict::Data) if the compiler's author vouches for it, else
    /// [`Ambiguous`](Verdict::Ambiguous).
    pub rest: Verdict,
}

impl Frame {
    /// A frame of which nothing is known yet but what to make of all the rest.
    pub fn new(function: u64, return_address: u64, rest: Verdict) -> Self {
        Self {
            function,
            return_address,
            size: None,
            words: Vec::new(),
            registers: Registers::default(),
            rest,
        }
    }

    /// Adds a word. Call [`finish`](Self::finish) after the last one.
    pub fn add(&mut self, base: Base, offset: i32, verdict: Verdict) {
        self.words.push(Word { base, offset, verdict });
    }

    /// Sorts the words and keeps one of each place: the verdict that says most, a pointer first.
    pub fn finish(mut self) -> Self {
        self.words.sort_unstable();
        self.words.dedup_by_key(|word| (word.base, word.offset));
        self
    }
}

/// How to get from a frame to its caller, for a range of code: a row of a DWARF unwind table.
///
/// For code that is in no `.eh_frame`. The return address is at CFA − 8.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnwindRow {
    /// The addresses of the code it holds for.
    pub code: Range<u64>,
    /// The register from which the CFA is counted, by its DWARF number (7 `rsp`, 6 `rbp`).
    pub cfa_register: u16,
    /// Bytes from that register's value to the CFA.
    pub cfa_offset: i32,
    /// Registers of the caller that lie in this frame: DWARF number, and bytes from the CFA.
    pub saved: Vec<(u16, i32)>,
}
