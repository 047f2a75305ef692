//! A frame map: what is known about one function's frame over a range of its code.
//!
//! ```text
//!   higher  │ the caller's frame    │
//!           ├───────────────────────┤ ◄ CFA: rsp in the caller, after the call has returned
//!   CFA - 8 │ return address        │
//!           │ saved rbp, rbx, ...   │ ◄ Rules::saved says where; their values are a caller's
//!           │ locals, spills, ...   │ ◄ words: pointer, data or ambiguous, each
//!     lower └───────────────────────┘ ◄ rsp
//! ```
#![forbid(unsafe_code)]

use core::fmt;
use core::ops::Range;

/// What is known about a word.
///
/// ```
/// assert_eq!(regrow::map::Verdict::default(), regrow::map::Verdict::Ambiguous);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(u8)]
pub enum Verdict {
    /// Nothing is known. The word is taken for a pointer if its value lies in the moving stack's window.
    #[default]
    Ambiguous = 0,
    /// A pointer, possibly null, possibly to elsewhere.
    Pointer = 1,
    /// Not a pointer to the stack, whatever its value.
    Data = 2,
}

impl Verdict {
    /// The verdict that [`bits`](Self::bits) gave these two bits for.
    pub(super) fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            1 => Self::Pointer,
            2 => Self::Data,
            _ => Self::Ambiguous,
        }
    }

    pub(super) fn bits(self) -> u8 {
        self as u8
    }
}

/// A general register, by its number in DWARF. Instructions number registers differently.
///
/// ```
/// use regrow::map::Register;
/// assert_eq!(Register::RSP.dwarf(), 7);
/// assert_eq!(Register::from_dwarf(6), Some(Register::RBP));
/// assert_eq!(Register::from_dwarf(16), None); // rip
/// assert_eq!(Register::R12.to_string(), "r12");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Register(u8);

macro_rules! registers {
    ($($name:ident $lower:literal $number:literal,)*) => {
        impl Register {
            $(#[doc = concat!("`", $lower, "`, number ", $number, ".")] pub const $name: Self = Self($number);)*
            const NAMES: [&'static str; 16] = [$($lower),*];
        }
    };
}

registers! {
    RAX "rax" 0, RDX "rdx" 1, RCX "rcx" 2, RBX "rbx" 3, RSI "rsi" 4, RDI "rdi" 5, RBP "rbp" 6, RSP "rsp" 7,
    R8 "r8" 8, R9 "r9" 9, R10 "r10" 10, R11 "r11" 11, R12 "r12" 12, R13 "r13" 13, R14 "r14" 14, R15 "r15" 15,
}

/// How many registers a callee must keep for its caller.
pub(super) const SAVED: usize = 6;

impl Register {
    /// The registers that a callee keeps for its caller, in the order that indices of callee-saved registers follow.
    pub const CALLEE_SAVED: [Self; SAVED] =
        [Self::RBX, Self::RBP, Self::R12, Self::R13, Self::R14, Self::R15];

    /// The register with this number, if it is a general one.
    ///
    /// ```
    /// use regrow::map::Register;
    /// assert_eq!(Register::from_dwarf(7), Some(Register::RSP));
    /// assert_eq!(Register::from_dwarf(17), None); // xmm0
    /// ```
    #[must_use]
    pub const fn from_dwarf(number: u16) -> Option<Self> {
        if number < 16 { Some(Self(number as u8)) } else { None }
    }

    /// Its number, 0 to 15.
    ///
    /// ```
    /// use regrow::map::Register;
    /// // The order in DWARF is rax, rdx, rcx, rbx; in instructions it is rax, rcx, rdx, rbx.
    /// assert_eq!([Register::RAX, Register::RDX, Register::RCX].map(Register::dwarf), [0, 1, 2]);
    /// ```
    #[must_use]
    pub const fn dwarf(self) -> u8 {
        self.0
    }

    /// Its place in [`CALLEE_SAVED`](Self::CALLEE_SAVED), if it is one of them.
    ///
    /// ```
    /// use regrow::map::Register;
    /// assert_eq!(Register::RBP.saved_index(), Some(1));
    /// assert_eq!(Register::RAX.saved_index(), None);
    /// ```
    #[must_use]
    #[inline]
    pub const fn saved_index(self) -> Option<usize> {
        match self {
            Self::RBX => Some(0),
            Self::RBP => Some(1),
            Self(number @ 12..) => Some(number as usize - 10),
            _ => None,
        }
    }
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(Self::NAMES[usize::from(self.0)])
    }
}

impl fmt::Debug for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where something lies: at an offset from the CFA or from a register, or not in this frame.
///
/// ```
/// use regrow::map::{Place, Register};
/// assert_eq!(Place::at(Register::RSP, 8).to_string(), "[rsp+8]");
/// assert_eq!(Place::cfa(-16).to_string(), "[cfa-16]");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place(i32); // the offset above 5 bits that say from where

/// What a [`Place`] is counted from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Origin {
    Register(Register),
    Cfa,
    /// Of a saved register: not touched. It is still where it was in the frames further in.
    Same,
    /// Of a saved register: lost.
    Undefined,
}

impl Place {
    /// Of a register: the function has not touched it.
    pub const SAME: Self = Self(Self::ORIGIN_SAME);
    /// Of a register: its value is lost. Of a return address: there is none, the frame is outermost.
    pub const UNDEFINED: Self = Self(Self::ORIGIN_UNDEFINED);

    const ORIGIN_CFA: i32 = 16;
    const ORIGIN_SAME: i32 = 17;
    const ORIGIN_UNDEFINED: i32 = 18;
    const ORIGIN_BITS: u32 = 5;
    const LIMIT: i64 = 1 << (31 - Self::ORIGIN_BITS);

    /// `offset` bytes above the CFA, or below it if negative.
    ///
    /// # Panics
    /// If `offset` is 64 MiB or more in either direction.
    ///
    /// ```
    /// use regrow::map::Place;
    /// let return_address = Place::cfa(-8);
    /// assert_eq!(return_address.to_string(), "[cfa-8]");
    /// ```
    #[must_use]
    pub fn cfa(offset: i32) -> Self {
        Self::checked(None, offset.into()).expect("an offset within 64 MiB")
    }

    /// `offset` bytes above where `register` points.
    ///
    /// # Panics
    /// As [`cfa`](Self::cfa).
    ///
    /// ```
    /// use regrow::map::{Place, Register};
    /// assert_eq!(Place::at(Register::RBP, -24).to_string(), "[rbp-24]");
    /// ```
    #[must_use]
    pub fn at(register: Register, offset: i32) -> Self {
        Self::checked(Some(register), offset.into()).expect("an offset within 64 MiB")
    }

    /// From a register or the CFA; `None` if the offset cannot be represented.
    pub(super) fn checked(register: Option<Register>, offset: i64) -> Option<Self> {
        let origin = register.map_or(Self::ORIGIN_CFA, |register| register.0.into());
        (-Self::LIMIT..Self::LIMIT)
            .contains(&offset)
            .then_some(Self((offset as i32) << Self::ORIGIN_BITS | origin))
    }

    #[inline]
    pub(super) fn origin(self) -> Origin {
        match self.0 & ((1 << Self::ORIGIN_BITS) - 1) {
            Self::ORIGIN_CFA => Origin::Cfa,
            Self::ORIGIN_SAME => Origin::Same,
            number @ 0..16 => Origin::Register(Register(number as u8)),
            _ => Origin::Undefined,
        }
    }

    #[inline]
    pub(super) fn offset(self) -> i32 {
        self.0 >> Self::ORIGIN_BITS
    }

    /// The place `bytes` further up, if it can be represented.
    pub(super) fn plus(self, bytes: i64) -> Option<Self> {
        let offset = i64::from(self.offset()) + bytes;
        match self.origin() {
            Origin::Register(register) => Self::checked(Some(register), offset),
            Origin::Cfa => Self::checked(None, offset),
            Origin::Same | Origin::Undefined => None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.origin() {
            Origin::Register(register) => write!(f, "[{register}{:+}]", self.offset()),
            Origin::Cfa => write!(f, "[cfa{:+}]", self.offset()),
            Origin::Same => f.write_str("same"),
            Origin::Undefined => f.write_str("undefined"),
        }
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How the CFA, the end of a frame, is found. `Register` and `Loaded` serve every frame that compilers make, realigned frames and
/// signal frames too.
///
/// ```
/// use regrow::map::{Cfa, Register};
/// assert_eq!(Cfa::rsp(8), Cfa::Register(Register::RSP, 8)); // a function that has pushed nothing
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Cfa {
    /// `register + offset`, in bytes.
    Register(Register, i32),
    /// `*(register + offset) + plus`, in bytes.
    Loaded {
        /// Where to look from.
        register: Register,
        /// How far above it.
        offset: i32,
        /// What to add to the word found.
        plus: i32,
    },
    /// A linkage table: `rsp + 8`, and 8 more from byte `pushed` of each 16-byte entry on.
    Plt {
        /// The first byte of an entry at which its push has run.
        pushed: u8,
    },
}

impl Cfa {
    /// `rsp + offset`.
    ///
    /// ```
    /// use regrow::map::{Cfa, Rules, Register};
    /// let before_the_prologue = Rules::new(Cfa::rsp(8));
    /// assert!(before_the_prologue.is_counted_from(Register::RSP));
    /// ```
    #[must_use]
    pub const fn rsp(offset: i32) -> Self {
        Self::Register(Register::RSP, offset)
    }

    /// `rbp + offset`. The offset is 16 in a function that has pushed rbp and copied rsp to it.
    ///
    /// ```
    /// use regrow::map::{Cfa, Register};
    /// assert_eq!(Cfa::rbp(16), Cfa::Register(Register::RBP, 16));
    /// ```
    #[must_use]
    pub const fn rbp(offset: i32) -> Self {
        Self::Register(Register::RBP, offset)
    }
}

/// The kind of a frame.
///
/// ```
/// use regrow::map::{Cfa, Kind, Place, Register, Rules};
/// // A handler's caller on x86-64 Linux: the interrupted rsp and rip are in the ucontext at rsp.
/// let rules = Rules::new(Cfa::Loaded { register: Register::RSP, offset: 160, plus: 0 })
///     .return_address(Place::at(Register::RSP, 168))
///     .kind(Kind::Signal);
/// assert!(rules.is_counted_from(Register::RSP));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(u8)]
pub enum Kind {
    /// An ordinary frame, called by the next one.
    #[default]
    Call,
    /// A signal frame, made by the kernel. The next frame was interrupted; it did not make a call.
    Signal,
    /// A coroutine's first frame. The next one is the resumer's, on another stack.
    Base,
}

/// How to get from a frame to its caller's frame.
///
/// ```
/// use regrow::map::{Cfa, Place, Register, Rules};
/// // push rbp; mov rbp, rsp; push rbx
/// let rules = Rules::new(Cfa::rbp(16))
///     .saved(Register::RBP, Place::cfa(-16))
///     .saved(Register::RBX, Place::cfa(-24));
/// assert_eq!(rules.place_of(Register::RBX), Some(Place::cfa(-24)));
/// assert_eq!(rules.place_of(Register::R12), Some(Place::SAME));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Rules {
    pub(super) cfa: Cfa,
    pub(super) return_address: Place,
    pub(super) saved: [Place; SAVED],
    pub(super) kind: Kind,
    /// The registers whose place is not [`Place::SAME`], as bits.
    pub(super) touched: u8,
    /// True if the return address and all saved registers are at offsets from the CFA: nearly always.
    pub(super) simple: bool,
}

impl Rules {
    /// A frame that has saved no register and has its return address right below the CFA.
    ///
    /// ```
    /// use regrow::map::{Cfa, Place, Register, Rules};
    /// let rules = Rules::new(Cfa::rsp(8));
    /// assert_eq!(rules.place_of(Register::RBP), Some(Place::SAME));
    /// ```
    #[must_use]
    pub fn new(cfa: Cfa) -> Self {
        Self {
            cfa,
            return_address: Place::cfa(-8),
            saved: [Place::SAME; SAVED],
            kind: Kind::Call,
            touched: 0,
            simple: true,
        }
    }

    /// Says where the function has saved its caller's `register`.
    ///
    /// # Panics
    /// If `register` is not one of [`Register::CALLEE_SAVED`].
    ///
    /// ```
    /// use regrow::map::{Cfa, Place, Register, Rules};
    /// let rules = Rules::new(Cfa::rsp(16)).saved(Register::RBX, Place::cfa(-16)); // push rbx
    /// assert_eq!(rules.place_of(Register::RBX), Some(Place::cfa(-16)));
    /// ```
    #[must_use]
    pub fn saved(mut self, register: Register, place: Place) -> Self {
        self.saved[register.saved_index().expect("a callee-saved register")] = place;
        self.summarised()
    }

    /// Says where the return address lies. [`Place::UNDEFINED`] means that there is none, and that the walk ends here.
    ///
    /// ```
    /// use regrow::map::{Cfa, End, FrameMap, Place, Registers, Rules, StackMaps, Walk};
    /// let maps = StackMaps::new();
    /// // Where a thread begins: nobody has called it.
    /// let rules = Rules::new(Cfa::rsp(8)).return_address(Place::UNDEFINED);
    /// let _registration = maps.register(vec![FrameMap::new(0x1000..0x1010).rules(rules)]);
    /// let reader = maps.read();
    /// let mut walk = Walk::new(&reader, &Registers::new(0x1000, 0x8000), |_| Some(0));
    /// assert_eq!(walk.by_ref().count(), 1);
    /// assert_eq!(walk.end(), Some(End::Outermost));
    /// ```
    #[must_use]
    pub fn return_address(mut self, place: Place) -> Self {
        self.return_address = place;
        self.summarised()
    }

    fn summarised(mut self) -> Self {
        let touched = |index: usize| u8::from(self.saved[index] != Place::SAME) << index;
        self.touched = (0..SAVED).map(touched).sum();
        self.simple = self.return_address.origin() == Origin::Cfa
            && self.saved.iter().all(|place| matches!(place.origin(), Origin::Cfa | Origin::Same));
        self
    }

    /// Says that this is not an ordinary frame.
    ///
    /// ```
    /// use regrow::map::{Cfa, FrameMap, Kind, Registers, Rules, StackMaps, Walk};
    /// let maps = StackMaps::new();
    /// let rules = Rules::new(Cfa::rsp(8)).kind(Kind::Base);
    /// let _registration = maps.register(vec![FrameMap::new(0x1000..0x1010).rules(rules)]);
    /// let reader = maps.read();
    /// let frame = Walk::new(&reader, &Registers::new(0x1000, 0x8000), |_| Some(0)).next().unwrap();
    /// assert_eq!(frame.kind(), Kind::Base);
    /// ```
    #[must_use]
    pub fn kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// How the frame's end is found.
    ///
    /// ```
    /// use regrow::map::{Cfa, Rules};
    /// assert_eq!(Rules::new(Cfa::rbp(16)).cfa(), Cfa::rbp(16));
    /// ```
    #[must_use]
    pub fn cfa(&self) -> Cfa {
        self.cfa
    }

    /// True if the frame's end is counted from `register`, which therefore is a pointer into the stack.
    ///
    /// ```
    /// use regrow::map::{Cfa, Register, Rules};
    /// assert!(Rules::new(Cfa::rbp(16)).is_counted_from(Register::RBP));
    /// ```
    #[inline]
    #[must_use]
    pub fn is_counted_from(&self, register: Register) -> bool {
        matches!(self.cfa, Cfa::Register(from, _) | Cfa::Loaded { register: from, .. } if from == register)
    }

    /// Where the function has saved its caller's `register`; `None` for a register that a callee need not keep.
    ///
    /// ```
    /// use regrow::map::{Cfa, Register, Rules};
    /// assert_eq!(Rules::new(Cfa::rsp(8)).place_of(Register::RAX), None);
    /// ```
    #[must_use]
    pub fn place_of(&self, register: Register) -> Option<Place> {
        register.saved_index().map(|index| self.saved[index])
    }
}

/// Why a frame cannot be walked although its function is known.
///
/// ```
/// assert_eq!(regrow::map::Unwalkable::StackPointer.to_string(), "it switches stacks");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Unwalkable {
    /// Its CFA is a DWARF expression that [`Cfa`] cannot express.
    CfaExpression,
    /// It switches stacks: its caller's stack pointer is not its CFA.
    StackPointer,
    /// Its return address is in a register, or at a place that [`Place`] cannot express.
    ReturnAddress,
    /// It keeps a callee-saved register in another register, or at a place that [`Place`] cannot express.
    SavedRegister,
    /// Its unwind instructions make no sense.
    Malformed,
}

impl Unwalkable {
    /// All of them, in order.
    pub const ALL: [Self; 5] =
        [Self::CfaExpression, Self::StackPointer, Self::ReturnAddress, Self::SavedRegister, Self::Malformed];
}

impl fmt::Display for Unwalkable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CfaExpression => "its end is given by an expression that is not supported",
            Self::StackPointer => "it switches stacks",
            Self::ReturnAddress => "its return address is not on the stack",
            Self::SavedRegister => "it saves a register where maps cannot say",
            Self::Malformed => "its unwind instructions are malformed",
        })
    }
}

/// Who recorded a frame map.
///
/// ```
/// assert_eq!(regrow::map::Source::EhFrame.to_string(), "eh_frame");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(u8)]
#[non_exhaustive]
pub enum Source {
    /// `.eh_frame`, the unwind tables of an object.
    EhFrame,
    /// The macros in `asm/frame_map.inc`.
    Assembly,
    /// `.llvm_stackmaps`.
    Llvm,
    /// User stack maps of Cranelift.
    Cranelift,
    /// Any other caller of [`register`](super::register).
    #[default]
    Other,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::EhFrame => "eh_frame",
            Self::Assembly => "assembly",
            Self::Llvm => "llvm",
            Self::Cranelift => "cranelift",
            Self::Other => "other",
        })
    }
}

/// What is known about a function's frame while `pc` is in a range of its code.
///
/// A map without [`rules`](Self::rules) takes those of the function's unwind tables. Words without a verdict are ambiguous.
///
/// ```
/// use regrow::map::{Cfa, FrameMap, Place, Register, Rules, Source, Verdict};
///
/// // sub rsp, 24: two words of locals and eight bytes of padding below the return address.
/// let map = FrameMap::new(0x1000..0x1040)
///     .rules(Rules::new(Cfa::rsp(32)))
///     .word(Place::at(Register::RSP, 0), Verdict::Pointer)
///     .word(Place::at(Register::RSP, 8), Verdict::Data)
///     .register(Register::RBX, Verdict::Data)
///     .rest(Verdict::Data)
///     .source(Source::Other);
///
/// // Only while a call that returns to 0x2005 has not returned:
/// let map = FrameMap::at_return(0x2005).word(Place::at(Register::RBP, -8), Verdict::Pointer);
/// assert_eq!(map.range(), 0x2004..0x2005);
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrameMap {
    pub(super) range: Range<usize>,
    pub(super) rules: Option<Result<Rules, Unwalkable>>,
    pub(super) words: Vec<(Place, Verdict)>,
    pub(super) rest: Verdict,
    pub(super) registers: [Verdict; SAVED],
    pub(super) source: Source,
}

impl FrameMap {
    /// An empty map for the code addresses from `range.start` to below `range.end`.
    ///
    /// ```
    /// use regrow::map::{FrameMap, StackMaps};
    /// let maps = StackMaps::new();
    /// let _registration = maps.register(vec![FrameMap::new(0x1000..0x1040)])?;
    /// assert!(maps.read().find(0x103f).unwrap().is_ambiguous());
    /// assert!(maps.read().find(0x1040).is_none());
    /// # Ok::<(), regrow::map::Error>(())
    /// ```
    #[must_use]
    pub fn new(range: Range<usize>) -> Self {
        Self {
            range,
            rules: None,
            words: Vec::new(),
            rest: Verdict::Ambiguous,
            registers: [Verdict::Ambiguous; SAVED],
            source: Source::Other,
        }
    }

    /// A map for the call that returns to `address`, and for no other instruction. It covers the call's last byte, where walkers look
    /// for a caller.
    ///
    /// It also holds when the call *cannot push* its return address because the stack is full: the frame is the same before the push
    /// and after the return. Only a decoder knows how long a call is. So look up a context that was interrupted at a call as walkers do,
    /// by the call's last byte: `pc + length - 1`.
    ///
    /// ```
    /// use regrow::map::{Cfa, FrameMap, Registers, Rules, StackMaps, Verdict, Walk, Word};
    /// let maps = StackMaps::new();
    /// // At 0x2000 a call of 5 bytes, in a frame of one word besides the return address.
    /// let map = FrameMap::at_return(0x2005).rules(Rules::new(Cfa::rsp(16))).rest(Verdict::Pointer);
    /// let _registration = maps.register(vec![map]);
    ///
    /// let (pc, length, rsp) = (0x2000, 5, 0x8000); // it faults at its push
    /// let interrupted = Registers::new(pc + length - 1, rsp);
    /// let reader = maps.read();
    /// let frame = Walk::new(&reader, &interrupted, |_| Some(0)).next().unwrap();
    /// assert_eq!(frame.word(rsp), Word::Own(Verdict::Pointer));
    /// ```
    #[must_use]
    pub fn at_return(address: usize) -> Self {
        Self::new(address.wrapping_sub(1)..address)
    }

    /// Gives the rules that lead to the caller's frame.
    ///
    /// ```
    /// use regrow::map::{Cfa, FrameMap, Rules, StackMaps};
    /// let maps = StackMaps::new();
    /// let rules = Rules::new(Cfa::rsp(32));
    /// let _registration = maps.register(vec![FrameMap::new(0x1000..0x1040).rules(rules)])?;
    /// assert_eq!(maps.read().find(0x1000).unwrap().rules(), Some(Ok(rules)));
    /// # Ok::<(), regrow::map::Error>(())
    /// ```
    #[must_use]
    pub fn rules(mut self, rules: Rules) -> Self {
        self.rules = Some(Ok(rules));
        self
    }

    /// Says that a walk cannot go through this frame, and why.
    ///
    /// ```
    /// use regrow::map::{End, FrameMap, Registers, StackMaps, Stuck, Unwalkable, Walk};
    /// let maps = StackMaps::new();
    /// let why = Unwalkable::StackPointer;
    /// let _registration = maps.register(vec![FrameMap::new(0x1000..0x1040).unwalkable(why)])?;
    /// let reader = maps.read();
    /// let mut walk = Walk::new(&reader, &Registers::new(0x1000, 0x8000), |_| Some(0));
    /// assert!(walk.next().is_none());
    /// assert_eq!(walk.end(), Some(End::Stuck { pc: 0x1000, why: Stuck::Rules(why) }));
    /// # Ok::<(), regrow::map::Error>(())
    /// ```
    #[must_use]
    pub fn unwalkable(mut self, reason: Unwalkable) -> Self {
        self.rules = Some(Err(reason));
        self
    }

    /// Gives the verdict for the word at `place`. The last one given for a place holds.
    ///
    /// Two places counted from different registers may be the same word. Then `Pointer` wins, and otherwise the verdict that is not
    /// [`rest`](Self::rest).
    ///
    /// ```
    /// use regrow::map::{FrameMap, Place, Register, Verdict};
    ///
    /// let spill = Place::at(Register::RSP, 16);
    /// let map = FrameMap::at_return(0x1005).word(spill, Verdict::Pointer).rest(Verdict::Data);
    /// assert_eq!(map.words(), [(spill, Verdict::Pointer)]);
    /// ```
    #[must_use]
    pub fn word(mut self, place: Place, verdict: Verdict) -> Self {
        self.words.push((place, verdict));
        self
    }

    /// Gives the verdict for all words of the frame that have none by [`word`](Self::word). It does not concern the return address and
    /// saved registers.
    ///
    /// ```
    /// use regrow::map::{FrameMap, StackMaps, Verdict};
    /// let maps = StackMaps::new();
    /// let _registration = maps.register(vec![FrameMap::at_return(0x1005).rest(Verdict::Data)])?;
    /// assert_eq!(maps.read().find(0x1004).unwrap().rest(), Verdict::Data);
    /// # Ok::<(), regrow::map::Error>(())
    /// ```
    #[must_use]
    pub fn rest(mut self, verdict: Verdict) -> Self {
        self.rest = verdict;
        self
    }

    /// Gives the verdict for a callee-saved register that the function uses itself. (A register that it has not touched belongs to a
    /// caller, whose map has the verdict. A register that the CFA is counted from is a pointer in any case.)
    ///
    /// # Panics
    /// If `register` is not one of [`Register::CALLEE_SAVED`].
    ///
    /// ```
    /// use regrow::map::{FrameMap, Register, Verdict};
    /// let map = FrameMap::at_return(0x1005).register(Register::RBX, Verdict::Pointer);
    /// assert_eq!(map.verdict_of(Register::RBX), Some(Verdict::Pointer));
    /// assert_eq!(map.verdict_of(Register::R12), Some(Verdict::Ambiguous));
    /// ```
    #[must_use]
    pub fn register(mut self, register: Register, verdict: Verdict) -> Self {
        self.registers[register.saved_index().expect("a callee-saved register")] = verdict;
        self
    }

    /// Gives the same verdict for all callee-saved registers, in place of those that [`register`](Self::register) gave before.
    ///
    /// ```
    /// use regrow::map::{FrameMap, Register, Verdict};
    /// // A call across which no register holds a pointer to the stack.
    /// let map = FrameMap::at_return(0x1005).registers(Verdict::Data);
    /// assert!(Register::CALLEE_SAVED.iter().all(|&register| map.verdict_of(register) == Some(Verdict::Data)));
    /// ```
    #[must_use]
    pub fn registers(mut self, verdict: Verdict) -> Self {
        self.registers = [verdict; SAVED];
        self
    }

    /// Says who recorded this, for reports.
    ///
    /// ```
    /// use regrow::map::{FrameMap, Source, StackMaps};
    /// let maps = StackMaps::new();
    /// let _registration = maps.register(vec![FrameMap::at_return(0x1005).source(Source::Llvm)])?;
    /// assert_eq!(maps.read().find(0x1004).unwrap().source(), Source::Llvm);
    /// # Ok::<(), regrow::map::Error>(())
    /// ```
    #[must_use]
    pub fn source(mut self, source: Source) -> Self {
        self.source = source;
        self
    }

    /// The code addresses that it covers.
    ///
    /// ```
    /// assert_eq!(regrow::map::FrameMap::at_return(0x1005).range(), 0x1004..0x1005);
    /// ```
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// The verdicts given for words, in the order they were given.
    ///
    /// ```
    /// use regrow::map::{FrameMap, Place, Register, Verdict};
    ///
    /// let map = (0..3).fold(FrameMap::at_return(0x1005), |map, word| {
    ///     map.word(Place::at(Register::RSP, word * 8), Verdict::Pointer)
    /// });
    /// assert_eq!(map.words().len(), 3);
    /// ```
    #[must_use]
    pub fn words(&self) -> &[(Place, Verdict)] {
        &self.words
    }

    /// The verdict for a callee-saved register that the function uses itself; `None` for another register.
    ///
    /// ```
    /// use regrow::map::{FrameMap, Register, Verdict};
    /// let map = FrameMap::at_return(0x2005).registers(Verdict::Data).register(Register::R12, Verdict::Pointer);
    /// assert_eq!(map.verdict_of(Register::R12), Some(Verdict::Pointer));
    /// assert_eq!(map.verdict_of(Register::RBX), Some(Verdict::Data));
    /// assert_eq!(map.verdict_of(Register::RAX), None);
    /// ```
    #[must_use]
    pub fn verdict_of(&self, register: Register) -> Option<Verdict> {
        register.saved_index().map(|index| self.registers[index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_keep_origin_and_offset_to_the_limits() {
        for offset in [0, 1, -1, 8, -8, (1 << 26) - 1, -(1 << 26)] {
            assert_eq!(Place::cfa(offset).origin(), Origin::Cfa);
            assert_eq!(Place::cfa(offset).offset(), offset);
            for register in (0..16).filter_map(Register::from_dwarf) {
                assert_eq!(Place::at(register, offset).origin(), Origin::Register(register));
                assert_eq!(Place::at(register, offset).offset(), offset);
            }
        }
        assert_eq!(Place::checked(None, 1 << 26), None);
        assert_eq!(Place::checked(None, -(1 << 26) - 1), None);
        assert_eq!(Place::SAME.origin(), Origin::Same);
        assert_eq!(Place::UNDEFINED.origin(), Origin::Undefined);
    }

    #[test]
    fn saved_registers_are_numbered_in_their_order() {
        for (index, register) in Register::CALLEE_SAVED.into_iter().enumerate() {
            assert_eq!(register.saved_index(), Some(index));
        }
        assert_eq!((0..16).filter_map(Register::from_dwarf).filter_map(Register::saved_index).count(), SAVED);
    }
}
