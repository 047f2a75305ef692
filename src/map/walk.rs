//! Walking a stack: from the registers of a context, frame by frame, to a coroutine's base or the end of the thread.
//!
//! ```text
//!               ┌──────────────────────┐ ◄ frame.range().end = CFA = where the caller's frame begins
//!               │ return address       │ ◄ frame.return_address(): says where in the caller
//!               │ caller's rbp, rbx .. │ ◄ frame.saved(i): values of whichever frame further out saved them itself
//!    a frame    │ words                │ ◄ frame.word(address)
//!               └──────────────────────┘ ◄ frame.range().start = rsp
//!               ┌──────────────────────┐
//!    further in │ a saved register     │ ◄ frame.register(i): where this frame's own value of it lies now
//!               └──────────────────────┘
//! ```
//!
//! A callee-saved register belongs to the frame that uses it. Seen from where the register's value lies, that is the next frame further
//! out that has saved its caller's value. The frames in between have not touched it.
//!
//! Nothing here allocates, panics or uses unsafe code. Memory is read through a function, which may refuse.
#![forbid(unsafe_code)]

use core::fmt;
use core::ops::Range;

use super::frame_map::{Cfa, Kind, Origin, Place, Register, Rules, SAVED, Unwalkable, Verdict};
use super::stack_maps::{Hints, Map, Reader};

const WORD: usize = size_of::<usize>();

/// How many look-ups a walk remembers.
const FOUND: usize = 8;

/// A walk that crosses this many bases or signal frames is taken for a loop.
const MOST_STACKS: u32 = 1 << 16;

/// The example of [`Frame`], in full there and hidden (`"# "`) in the examples that go on from it.
macro_rules! an_interrupted_frame {
    ($hide:literal) => {
        concat!(
            $hide, "use regrow::map::{Cfa, FrameMap, Kind, Location, Place, Register, Registers, Rules, StackMaps, Verdict, Walk, Word};\n",
            $hide, "// push rbp; mov rbp, rsp; sub rsp, 16; interrupted there. Its map says that the word at rsp + 8 is a pointer.\n",
            $hide, "let rules = Rules::new(Cfa::rbp(16)).saved(Register::RBP, Place::cfa(-16));\n",
            $hide, "let map = FrameMap::new(0x1000..0x1100).rules(rules).word(Place::cfa(-24), Verdict::Pointer);\n",
            $hide, "let maps = StackMaps::new();\n",
            $hide, "let _registration = maps.register(vec![map]);\n",
            $hide, "// The stack at 0x8000: two words, the caller's rbp, the return address.\n",
            $hide, "let stack = [1, 0x8018, 0x9000, 0x2050];\n",
            $hide, "let memory = |address: usize| stack.get(address.wrapping_sub(0x8000) / 8).copied();\n",
            $hide, "let start = Registers::new(0x1010, 0x8000).with(Register::RBP, 0x8010);\n",
            $hide, "let reader = maps.read();\n",
            $hide, "let frame = Walk::new(&reader, &start, memory).next().unwrap();",
        )
    };
}

/// The registers that a walk starts from. A register without a value is not known.
///
/// ```
/// use regrow::map::{Register, Registers};
/// let registers = Registers::new(0x1234, 0x7fff_0000).with(Register::RBP, 7);
/// assert_eq!(registers.get(Register::RSP), Some(0x7fff_0000));
/// assert_eq!(registers.get(Register::RBX), None);
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Registers {
    pc: usize,
    general: [usize; 16],
    known: u16,
}

impl Registers {
    /// Nothing is known.
    pub const UNKNOWN: Self = Self { pc: 0, general: [0; 16], known: 0 };

    /// `pc`: the instruction that was interrupted, or will run next.
    ///
    /// ```
    /// use regrow::map::{Register, Registers};
    /// let registers = Registers::new(0x1234, 0x8000);
    /// assert_eq!((registers.pc(), registers.get(Register::RSP)), (0x1234, Some(0x8000)));
    /// ```
    #[must_use]
    pub fn new(pc: usize, rsp: usize) -> Self {
        Self { pc, ..Self::UNKNOWN }.with(Register::RSP, rsp)
    }

    /// Adds a register's value.
    ///
    /// ```
    /// use regrow::map::{Register, Registers};
    /// let registers = Registers::new(0x1234, 0x8000).with(Register::RBP, 0x8010).with(Register::RBX, 0);
    /// assert_eq!(registers.get(Register::RBP), Some(0x8010));
    /// ```
    #[must_use]
    pub fn with(mut self, register: Register, value: usize) -> Self {
        self.general[usize::from(register.dwarf())] = value;
        self.known |= 1 << register.dwarf();
        self
    }

    /// A register's value, if it is known.
    ///
    /// ```
    /// use regrow::map::{Register, Registers};
    /// assert_eq!(Registers::UNKNOWN.get(Register::RSP), None);
    /// ```
    #[inline]
    #[must_use]
    pub fn get(&self, register: Register) -> Option<usize> {
        let known = self.known >> register.dwarf() & 1 != 0;
        if known { self.general.get(usize::from(register.dwarf())).copied() } else { None }
    }

    /// The address of the instruction.
    ///
    /// ```
    /// assert_eq!(regrow::map::Registers::new(0x1234, 0x8000).pc(), 0x1234);
    /// ```
    #[must_use]
    pub fn pc(&self) -> usize {
        self.pc
    }
}

impl fmt::Debug for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rip {:#x}", self.pc)?;
        for register in (0..16).filter_map(Register::from_dwarf) {
            if let Some(value) = self.get(register) {
                write!(f, ", {register} {value:#x}")?;
            }
        }
        Ok(())
    }
}

/// Where a frame's value of a callee-saved register lies; see [`Frame::register`].
///
/// Of the frame in [`Frame`]'s example:
///
/// ```
#[doc = an_interrupted_frame!("# ")]
/// assert_eq!(frame.register(1), Location::Register); // rbp, which the interrupted code is using
/// assert_eq!(frame.register(0), Location::Lost); // rbx, which the walk was not given
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Location {
    /// In the register itself.
    Register,
    /// At this address, in a frame further in.
    Memory(usize),
    /// Nowhere: the walk was not given it, or a frame did not keep it.
    Lost,
}

/// A [`Location`] in one word. No stack lies at the two highest addresses.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Packed(usize);

impl Packed {
    const REGISTER: Self = Self(usize::MAX);
    const LOST: Self = Self(usize::MAX - 1);

    #[inline]
    fn location(self) -> Location {
        match self {
            Self::REGISTER => Location::Register,
            Self::LOST => Location::Lost,
            Self(address) => Location::Memory(address),
        }
    }
}

/// What a word of a frame is; see [`Frame::word`].
///
/// Of the frame in [`Frame`]'s example:
///
/// ```
#[doc = an_interrupted_frame!("# ")]
/// let words: Vec<Word> = frame.range().step_by(8).map(|address| frame.word(address)).collect();
/// let ambiguous = Word::Own(Verdict::Ambiguous);
/// let expected = [ambiguous, Word::Own(Verdict::Pointer), Word::Saved(Register::RBP), Word::ReturnAddress];
/// assert_eq!(words, expected);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Word {
    /// The return address.
    ReturnAddress,
    /// A register that the frame keeps for its callers. The frame that owns the register gives its verdict.
    Saved(Register),
    /// The frame's own, with its verdict.
    Own(Verdict),
}

/// One frame of a [`Walk`].
///
/// ```
#[doc = an_interrupted_frame!("")]
/// assert_eq!(frame.range(), 0x8000..0x8020);
/// ```
///
/// The examples of the methods go on from there.
///
/// Each word of a stack, and each callee-saved register, has one owner. So this visits each of them once:
/// ```
/// use regrow::map::{Frame, Location, Verdict, Word};
///
/// fn visit(frame: &Frame<'_>, mut word: impl FnMut(Location, Verdict)) {
///     for address in frame.range().step_by(8) {
///         if let Word::Own(verdict) = frame.word(address) {
///             word(Location::Memory(address), verdict);
///         }
///     }
///     for index in (0..6).filter(|&index| frame.owns(index)) {
///         word(frame.register(index), frame.map().register(index));
///     }
/// }
/// # let _ = |frame: &Frame<'_>| visit(frame, |_, _| ());
/// ```
#[derive(Clone, Copy)]
pub struct Frame<'a> {
    pc: usize,
    exact: bool,
    kind: Kind,
    rsp: usize,
    cfa: usize,
    /// 0 if there is none.
    return_address: usize,
    /// Where the frame's own values are.
    registers: [Packed; SAVED],
    /// Where it has put its callers': in the register, if it has not touched it.
    saved: [Packed; SAVED],
    /// Which of the registers it uses itself.
    owned: u8,
    /// The frame's own values, as far as its words are counted from them; 0 otherwise.
    values: [usize; SAVED],
    map: Map<'a>,
}

impl<'a> Frame<'a> {
    /// The instruction where its code was interrupted, or to which its call will return.
    ///
    /// ```
    #[doc = an_interrupted_frame!("# ")]
    /// assert_eq!(frame.pc(), 0x1010);
    /// ```
    #[must_use]
    pub fn pc(&self) -> usize {
        self.pc
    }

    /// The address by which its map was found. It lies in the interrupted instruction, or in the call that has not returned.
    ///
    /// ```
    #[doc = an_interrupted_frame!("# ")]
    /// assert_eq!(frame.code(), frame.pc()); // it was interrupted; in a caller it is one less
    /// ```
    #[must_use]
    pub fn code(&self) -> usize {
        if self.exact { self.pc } else { self.pc.wrapping_sub(1) }
    }

    /// Its kind: ordinary, a signal's, or a coroutine's first.
    ///
    /// ```
    #[doc = an_interrupted_frame!("# ")]
    /// assert_eq!(frame.kind(), Kind::Call);
    /// ```
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its bytes on the stack: from its stack pointer to where its caller's frame begins.
    ///
    /// A base has none: what lies above it is no frame, and the caller is on another stack. A signal frame ends where the
    /// interrupted stack pointer was, which may be on another stack too, above or below.
    ///
    /// ```
    #[doc = an_interrupted_frame!("# ")]
    /// assert_eq!(frame.range(), 0x8000..0x8020);
    /// ```
    #[inline]
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.rsp..if self.kind == Kind::Base { self.rsp } else { self.cfa }
    }

    /// The address of its return address; `None` in the thread's outermost frame.
    ///
    /// ```
    #[doc = an_interrupted_frame!("# ")]
    /// assert_eq!(frame.return_address().and_then(memory), Some(0x2050));
    /// ```
    #[must_use]
    pub fn return_address(&self) -> Option<usize> {
        (self.return_address != 0).then_some(self.return_address)
    }

    /// Where this frame's value of the `index`th of [`Register::CALLEE_SAVED`] lies.
    ///
    /// ```
    #[doc = an_interrupted_frame!("# ")]
    /// let rbp = Register::RBP.saved_index().unwrap();
    /// assert_eq!(frame.register(rbp), Location::Register);
    /// ```
    #[inline]
    #[must_use]
    pub fn register(&self, index: usize) -> Location {
        self.registers.get(index).map_or(Location::Lost, |packed| packed.location())
    }

    /// True if the frame uses that register itself. Then the value at [`register`](Self::register) is the frame's own, and its map has
    /// the verdict.
    ///
    /// ```
    #[doc = an_interrupted_frame!("# ")]
    /// assert!(Register::RBP.saved_index().is_some_and(|rbp| frame.owns(rbp)));
    /// assert!(Register::R12.saved_index().is_some_and(|r12| !frame.owns(r12)));
    /// ```
    #[inline]
    #[must_use]
    pub fn owns(&self, index: usize) -> bool {
        index < SAVED && self.owned >> index & 1 != 0
    }

    /// Where the frame has saved the value that its caller had in this register.
    ///
    /// ```
    #[doc = an_interrupted_frame!("# ")]
    /// let rbp = Register::RBP.saved_index().unwrap();
    /// assert_eq!(frame.saved(rbp).and_then(memory), Some(0x9000)); // the caller's
    /// ```
    #[inline]
    #[must_use]
    pub fn saved(&self, index: usize) -> Option<usize> {
        match self.saved.get(index)?.location() {
            Location::Memory(address) => Some(address),
            Location::Register | Location::Lost => None,
        }
    }

    /// The map of its code.
    ///
    /// ```
    #[doc = an_interrupted_frame!("# ")]
    /// assert_eq!(frame.map().rest(), Verdict::Ambiguous);
    /// ```
    #[must_use]
    pub fn map(&self) -> &Map<'a> {
        &self.map
    }

    /// What the word at `address` is.
    ///
    /// ```
    #[doc = an_interrupted_frame!("# ")]
    /// assert_eq!(frame.word(0x8008), Word::Own(Verdict::Pointer));
    /// assert_eq!(frame.word(0x8010), Word::Saved(Register::RBP));
    /// ```
    #[inline]
    #[must_use]
    pub fn word(&self, address: usize) -> Word {
        if address == self.return_address {
            return Word::ReturnAddress;
        }
        if let Some(index) = self.saved.iter().position(|&place| place == Packed(address))
            && let Some(&register) = Register::CALLEE_SAVED.get(index)
        {
            return Word::Saved(register);
        }
        Word::Own(self.map.word(address, |place| self.address_of(place)))
    }

    /// True if neither its words nor the registers it uses are ambiguous.
    ///
    /// ```
    #[doc = an_interrupted_frame!("# ")]
    /// assert!(!frame.is_precise()); // nothing is known of the word at rsp
    /// ```
    #[must_use]
    pub fn is_precise(&self) -> bool {
        let words = self.range().step_by(WORD);
        let registers = 0..SAVED;
        words.into_iter().all(|address| self.word(address) != Word::Own(Verdict::Ambiguous))
            && registers
                .into_iter()
                .all(|index| !self.owns(index) || self.map.register(index) != Verdict::Ambiguous)
    }

    fn address_of(&self, place: Place) -> Option<usize> {
        let origin = match place.origin() {
            Origin::Cfa => self.cfa,
            Origin::Register(Register::RSP) => self.rsp,
            Origin::Register(register) => *self.values.get(register.saved_index()?)?,
            Origin::Same | Origin::Undefined => return None,
        };
        Some(origin.wrapping_add_signed(place.offset() as isize))
    }
}

impl fmt::Debug for Frame<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {:#x}, {:#x}..{:#x}", self.kind, self.pc, self.rsp, self.cfa)
    }
}

/// How a walk ended.
///
/// ```
/// use regrow::map::{self, End, Registers, Stuck, Walk};
/// let reader = map::process().read();
/// let mut walk = Walk::new(&reader, &Registers::new(8, 0), |_| None); // no code is at address 8
/// assert!(walk.next().is_none());
/// assert_eq!(walk.end(), Some(End::Stuck { pc: 8, why: Stuck::NoMap }));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// At a coroutine's base, which was the last frame.
    Base,
    /// At the outermost frame of a thread, which was the last.
    Outermost,
    /// Before a frame that could not be walked.
    Stuck {
        /// The frame's program counter.
        pc: usize,
        /// Why not.
        why: Stuck,
    },
}

/// Why a walk cannot go on. Printed, it is a phrase about the frame at which the walk stopped.
///
/// ```
/// assert_eq!(regrow::map::Stuck::NoMap.to_string(), "no map is for its code");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stuck {
    /// The code has no map: it was compiled at run time, or written by hand, without unwind tables.
    NoMap,
    /// The code has a map of its words, but no unwind tables.
    NoRules,
    /// Its unwind tables cannot be followed.
    Rules(Unwalkable),
    /// The word at this address cannot be read.
    Memory(usize),
    /// The frame's end or words are counted from this register, and its value is not known.
    Register(Register),
    /// The caller's frame would not lie above this one. Memory is corrupt, or the walk runs in circles.
    NoProgress,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMap => f.write_str("no map is for its code"),
            Self::NoRules => f.write_str("a map gives its words, but nothing says where it ends"),
            Self::Rules(reason) => reason.fmt(f),
            Self::Memory(address) => write!(f, "the word at {address:#x} cannot be read"),
            Self::Register(register) => write!(f, "the value of {register} is not known"),
            Self::NoProgress => f.write_str("its caller's frame would not lie above it"),
        }
    }
}

/// The frames of a stack, innermost first.
///
/// ```
/// use regrow::map::{Cfa, End, FrameMap, Kind, Register, Registers, Rules, StackMaps, Walk};
///
/// let maps = StackMaps::new();
/// let _registration = maps.register(vec![
///     FrameMap::new(0x1000..0x1100).rules(Rules::new(Cfa::rsp(16))), // a leaf with one word
///     FrameMap::new(0x2000..0x2100).rules(Rules::new(Cfa::rsp(8)).kind(Kind::Base)),
/// ]);
/// let stack = [7, 0x2050, 0]; // at address 0x8000: the leaf's word, its return address, the base's frame
/// let memory = |address: usize| stack.get((address - 0x8000) / 8).copied();
///
/// let reader = maps.read();
/// let mut walk = Walk::new(&reader, &Registers::new(0x1010, 0x8000), memory);
/// let ranges: Vec<_> = walk.by_ref().map(|frame| frame.range()).collect();
/// assert_eq!(ranges, [0x8000..0x8010, 0x8010..0x8010]);
/// assert_eq!(walk.end(), Some(End::Base));
/// ```
pub struct Walk<'a, M> {
    reader: &'a Reader<'a>,
    hints: Hints<'a>,
    /// What the latest look-ups found, each in the place that its address decides: recursion comes by again.
    found: [Option<(usize, Map<'a>)>; FOUND],
    memory: M,
    start: Registers,
    across: bool,
    stacks: u32,
    /// Of the next frame, or how the walk ended.
    next: Result<usize, End>,
    /// The next frame's stack pointer.
    rsp: usize,
    /// `next` is an instruction that has not run, not one after a call.
    exact: bool,
    /// The registers are those of the start: those that calls do not keep are known, too.
    innermost: bool,
    /// Where the next frame's callee-saved registers are.
    registers: [Packed; SAVED],
    frame: Option<Frame<'a>>,
}

impl<'a, M: Fn(usize) -> Option<usize>> Walk<'a, M> {
    /// A walk that starts at `start`. `memory` returns the word at an address, or `None` if it may not be read.
    ///
    /// ```
    /// use regrow::map::{Cfa, FrameMap, Registers, Rules, StackMaps, Walk};
    /// let maps = StackMaps::new();
    /// let _registration = maps.register(vec![FrameMap::new(0x1000..0x1100).rules(Rules::new(Cfa::rsp(16)))]);
    /// // A recursion, on a stack that was copied from 0x8000.
    /// let stack = [7, 0x1050, 8, 0x1050, 9, 0];
    /// let memory = |address: usize| stack.get(address.checked_sub(0x8000)? / 8).copied();
    /// let reader = maps.read();
    /// assert_eq!(Walk::new(&reader, &Registers::new(0x1000, 0x8000), memory).count(), 3);
    /// ```
    #[inline]
    pub fn new(reader: &'a Reader<'a>, start: &Registers, memory: M) -> Self {
        let place = |register| if start.get(register).is_some() { Packed::REGISTER } else { Packed::LOST };
        Self {
            reader,
            hints: Hints::default(),
            found: [None; FOUND],
            memory,
            start: *start,
            across: false,
            stacks: 0,
            next: Ok(start.pc),
            rsp: start.get(Register::RSP).unwrap_or_default(),
            exact: true,
            innermost: true,
            registers: Register::CALLEE_SAVED.map(place),
            frame: None,
        }
    }

    /// Continues past a coroutine's base, with the frames of its resumer.
    ///
    /// ```
    /// use regrow::map::{Cfa, FrameMap, Kind, Registers, Rules, StackMaps, Walk};
    /// let maps = StackMaps::new();
    /// let _registration = maps.register(vec![
    ///     FrameMap::new(0x1000..0x1100).rules(Rules::new(Cfa::rsp(16))),
    ///     FrameMap::new(0x2000..0x2100).rules(Rules::new(Cfa::rsp(8)).kind(Kind::Base)),
    /// ]);
    /// let stack = [7, 0x2050, 0x1050, 7, 0]; // a frame, the base's, one of the resumer
    /// let memory = |address: usize| stack.get(address.checked_sub(0x8000)? / 8).copied();
    /// let reader = maps.read();
    /// let walk = || Walk::new(&reader, &Registers::new(0x1010, 0x8000), memory);
    /// assert_eq!((walk().count(), walk().across_bases().count()), (2, 3));
    /// ```
    #[must_use]
    pub fn across_bases(mut self) -> Self {
        self.across = true;
        self
    }

    /// How the walk ended; `None` until it has.
    ///
    /// ```
    /// use regrow::map::{Cfa, End, FrameMap, Registers, Rules, StackMaps, Stuck, Walk};
    /// let maps = StackMaps::new();
    /// let _registration = maps.register(vec![FrameMap::new(0x1000..0x1100).rules(Rules::new(Cfa::rsp(8)))]);
    /// let reader = maps.read();
    /// let mut walk = Walk::new(&reader, &Registers::new(0x1000, 0x8000), |_| Some(0x3000));
    /// assert_eq!(walk.end(), None);
    /// while walk.next().is_some() {}
    /// assert_eq!(walk.end(), Some(End::Stuck { pc: 0x3000, why: Stuck::NoMap }));
    /// ```
    pub fn end(&self) -> Option<End> {
        self.next.err()
    }

    /// The next frame, as [`next`](Iterator::next), but without a copy of it.
    ///
    /// ```
    /// use regrow::map::{Cfa, FrameMap, Registers, Rules, StackMaps, Walk};
    /// let maps = StackMaps::new();
    /// let _registration = maps.register(vec![FrameMap::new(0x1000..0x1100).rules(Rules::new(Cfa::rsp(8)))]);
    /// let reader = maps.read();
    /// let mut walk = Walk::new(&reader, &Registers::new(0x1000, 0x8000), |_| Some(0));
    /// let mut bytes = 0;
    /// while let Some(frame) = walk.advance() {
    ///     bytes += frame.range().len();
    /// }
    /// assert_eq!(bytes, 8);
    /// ```
    #[inline]
    pub fn advance(&mut self) -> Option<&Frame<'a>> {
        let pc = self.next.ok()?;
        if let Err(why) = self.step(pc) {
            self.next = Err(End::Stuck { pc, why });
            return None;
        }
        self.frame.as_ref()
    }

    /// Makes the frame at `pc` the current one; afterwards, `self` is at its caller.
    #[inline]
    fn step(&mut self, pc: usize) -> Result<(), Stuck> {
        let code = if self.exact { pc } else { pc.wrapping_sub(1) };
        let map = self.find(code).ok_or(Stuck::NoMap)?;
        let rules =
            map.rules_here().ok_or(Stuck::NoRules)?.as_ref().map_err(|reason| Stuck::Rules(*reason))?;
        let cfa = self.cfa(rules, pc)?;
        if cfa <= self.rsp || rules.kind != Kind::Call {
            self.other_stack(rules.kind)?;
        }
        let (return_address, saved) = if rules.simple {
            let at = |place: Place| cfa.wrapping_add_signed(place.offset() as isize);
            let saved =
                |place: Place| if place == Place::SAME { Packed::REGISTER } else { Packed(at(place)) };
            (at(rules.return_address), rules.saved.map(saved))
        } else {
            self.places(rules, cfa)?
        };
        let frame = self.frame.insert(Frame {
            pc,
            exact: self.exact,
            kind: rules.kind,
            rsp: self.rsp,
            cfa,
            return_address,
            registers: self.registers,
            saved,
            owned: rules.touched,
            values: [0; SAVED],
            map,
        });
        if !map.is_ambiguous() {
            let mut frame = *frame;
            self.word_bases(&mut frame)?;
            self.frame = Some(frame);
        }
        self.next = self.caller(pc, return_address, rules);
        for (register, &saved) in self.registers.iter_mut().zip(&saved) {
            *register = if saved == Packed::REGISTER { *register } else { saved };
        }
        self.rsp = cfa;
        self.exact = rules.kind != Kind::Call;
        self.innermost = false;
        Ok(())
    }

    #[inline]
    fn find(&mut self, code: usize) -> Option<Map<'a>> {
        let found = &mut self.found[(code ^ code >> 4) % FOUND];
        if let Some((known, map)) = *found
            && known == code
        {
            return Some(map);
        }
        let map = self.reader.find_near(code, &mut self.hints)?;
        *found = Some((code, map));
        Some(map)
    }

    /// The address of the return address, 0 if there is none, and where the callers' registers are.
    #[cold]
    fn places(&self, rules: &Rules, cfa: usize) -> Result<(usize, [Packed; SAVED]), Stuck> {
        let return_address = self.address(rules.return_address, cfa)?.unwrap_or(0);
        let mut saved = [Packed::REGISTER; SAVED];
        for (saved, &place) in saved.iter_mut().zip(&rules.saved) {
            if place != Place::SAME {
                *saved = self.address(place, cfa)?.map_or(Packed::LOST, Packed);
            }
        }
        Ok((return_address, saved))
    }

    /// Where the caller of the frame at `pc` goes on.
    #[inline]
    fn caller(&self, pc: usize, return_address: usize, rules: &Rules) -> Result<usize, End> {
        if rules.kind == Kind::Base && !self.across {
            return Err(End::Base);
        }
        if return_address == 0 {
            return Err(End::Outermost);
        }
        (self.memory)(return_address).ok_or(End::Stuck { pc, why: Stuck::Memory(return_address) })
    }

    #[inline]
    fn cfa(&self, rules: &Rules, pc: usize) -> Result<usize, Stuck> {
        match rules.cfa {
            Cfa::Register(register, offset) => Ok(self.value(register)?.wrapping_add_signed(offset as isize)),
            Cfa::Loaded { register, offset, plus } => {
                let address = self.value(register)?.wrapping_add_signed(offset as isize);
                Ok(self.load(address)?.wrapping_add_signed(plus as isize))
            }
            Cfa::Plt { pushed } => {
                let words = if pc & 15 >= usize::from(pushed) { 2 } else { 1 };
                Ok(self.rsp.wrapping_add(words * WORD))
            }
        }
    }

    /// The value a register has in the frame that is next.
    #[inline]
    fn value(&self, register: Register) -> Result<usize, Stuck> {
        if register == Register::RSP {
            return Ok(self.rsp);
        }
        let unknown = Stuck::Register(register);
        let Some(index) = register.saved_index() else {
            return self.start.get(register).filter(|_| self.innermost).ok_or(unknown);
        };
        match self.registers.get(index).map(|packed| packed.location()) {
            Some(Location::Register) => self.start.get(register).ok_or(unknown),
            Some(Location::Memory(address)) => self.load(address),
            _ => Err(unknown),
        }
    }

    #[inline]
    fn load(&self, address: usize) -> Result<usize, Stuck> {
        (self.memory)(address).ok_or(Stuck::Memory(address))
    }

    /// The address of a place in the frame that is next; `None` if it says that there is none.
    fn address(&self, place: Place, cfa: usize) -> Result<Option<usize>, Stuck> {
        let origin = match place.origin() {
            Origin::Cfa => cfa,
            Origin::Register(register) => self.value(register)?,
            Origin::Same | Origin::Undefined => return Ok(None),
        };
        Ok(Some(origin.wrapping_add_signed(place.offset() as isize)))
    }

    /// Finds the values that the places of the frame's words are counted from.
    fn word_bases(&self, frame: &mut Frame<'_>) -> Result<(), Stuck> {
        for place in frame.map.word_places() {
            if let Origin::Register(register) = place.origin()
                && register != Register::RSP
            {
                let index = register.saved_index().ok_or(Stuck::Register(register))?;
                if let Some(value) = frame.values.get_mut(index) {
                    *value = self.value(register)?;
                }
            }
        }
        Ok(())
    }

    /// A step that need not go up: only signal frames and bases make one, and not for ever.
    #[cold]
    fn other_stack(&mut self, kind: Kind) -> Result<(), Stuck> {
        self.stacks += 1;
        if kind == Kind::Call || self.stacks > MOST_STACKS { Err(Stuck::NoProgress) } else { Ok(()) }
    }
}

impl<'a, M: Fn(usize) -> Option<usize>> Iterator for Walk<'a, M> {
    type Item = Frame<'a>;

    #[inline]
    fn next(&mut self) -> Option<Frame<'a>> {
        self.advance().copied()
    }
}

impl<M> fmt::Debug for Walk<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Walk").field("next", &self.next).field("rsp", &self.rsp).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::frame_map::FrameMap;
    use crate::map::stack_maps::StackMaps;

    const STACK: usize = 0x8000;

    fn maps(maps: Vec<FrameMap>) -> StackMaps {
        let all = StackMaps::new();
        core::mem::forget(all.register(maps).unwrap());
        all
    }

    fn code(number: usize) -> Range<usize> {
        number * 0x1000..number * 0x1000 + 0x100
    }

    /// Walks a stack of these words at `STACK`.
    fn walk(maps: &StackMaps, start: &Registers, stack: &[usize], check: impl FnOnce(&[Frame<'_>], End)) {
        let memory = |address: usize| stack.get(address.checked_sub(STACK)? / WORD).copied();
        let reader = maps.read();
        let mut walk = Walk::new(&reader, start, memory);
        let frames: Vec<_> = walk.by_ref().take(100).collect();
        check(&frames, walk.end().expect("an end within 100 frames"));
    }

    fn base() -> FrameMap {
        FrameMap::new(code(9)).rules(Rules::new(Cfa::rsp(8)).kind(Kind::Base))
    }

    /// rbx passes through two frames that do not touch it; the third one owns it.
    #[test]
    fn a_saved_register_belongs_to_the_frame_that_saved_it_before() {
        let saves_rbx = Rules::new(Cfa::rsp(16)).saved(Register::RBX, Place::cfa(-16));
        let maps = maps(vec![
            FrameMap::new(code(1)).rules(saves_rbx),
            FrameMap::new(code(2)).rules(Rules::new(Cfa::rsp(16))),
            FrameMap::new(code(3)).rules(saves_rbx).register(Register::RBX, Verdict::Pointer),
            base(),
        ]);
        let stack = [33, 0x2010, 0, 0x3010, 99, 0x9010, 0];
        let start = Registers::new(0x1000, STACK).with(Register::RBX, 11);
        walk(&maps, &start, &stack, |frames, end| {
            assert_eq!(end, End::Base);
            let rbx = |frame: &Frame<'_>| (frame.register(0), frame.owns(0), frame.saved(0));
            assert_eq!(rbx(&frames[0]), (Location::Register, true, Some(STACK)));
            assert_eq!(rbx(&frames[1]), (Location::Memory(STACK), false, None));
            assert_eq!(rbx(&frames[2]), (Location::Memory(STACK), true, Some(STACK + 32)));
            assert_eq!(rbx(&frames[3]), (Location::Memory(STACK + 32), false, None));
            assert_eq!(frames[2].map().register(0), Verdict::Pointer);
            // Of r12 nothing was said when the walk began.
            assert_eq!(frames[0].register(2), Location::Lost);
        });
    }

    #[test]
    fn every_word_has_one_owner_and_its_verdict() {
        let rules = Rules::new(Cfa::rbp(16)).saved(Register::RBP, Place::cfa(-16));
        let map = FrameMap::at_return(0x2010)
            .rules(rules)
            .word(Place::at(Register::RSP, 0), Verdict::Pointer)
            .word(Place::at(Register::RBP, -8), Verdict::Ambiguous)
            .rest(Verdict::Data);
        let maps = maps(vec![FrameMap::new(code(1)).rules(Rules::new(Cfa::rsp(8))), map, base()]);
        //           caller's frame: rsp ...  rbp-8  rbp             return address
        let stack = [0x2010, 1, 2, 3, 4, 0xbbbb, 0x9010, 0];
        let start = Registers::new(0x1000, STACK).with(Register::RBP, STACK + 40);
        walk(&maps, &start, &stack, |frames, _| {
            let frame = &frames[1];
            assert_eq!(frame.range(), STACK + 8..STACK + 56);
            let words: Vec<_> = frame.range().step_by(WORD).map(|address| frame.word(address)).collect();
            let own = Word::Own;
            assert_eq!(
                words,
                [
                    own(Verdict::Pointer),
                    own(Verdict::Data),
                    own(Verdict::Data),
                    own(Verdict::Ambiguous),
                    Word::Saved(Register::RBP),
                    Word::ReturnAddress,
                ]
            );
            assert!(!frame.is_precise());
            assert_eq!(frame.saved(1), Some(STACK + 40));
        });
    }

    /// Words from one source, rules from another: that is how LLVM's stack maps come.
    #[test]
    fn words_without_rules_take_those_of_the_unwind_tables() {
        let all = maps(vec![FrameMap::new(0x1010..0x1011).rest(Verdict::Data)]);
        let start = Registers::new(0x1010, STACK);
        walk(&all, &start, &[0; 4], |frames, end| {
            assert!(frames.is_empty());
            assert_eq!(end, End::Stuck { pc: 0x1010, why: Stuck::NoRules });
        });
        let unwind = vec![FrameMap::new(code(1)).rules(Rules::new(Cfa::rsp(16))), base()];
        let _registration = all.add(crate::map::stack_maps::LayerName::Unwind, unwind).unwrap();
        walk(&all, &start, &[0, 0x9010, 0], |frames, end| {
            assert_eq!(end, End::Base);
            assert_eq!(frames[0].range(), STACK..STACK + 16);
            assert_eq!(frames[0].word(STACK), Word::Own(Verdict::Data));
        });
    }

    /// After a signal frame the program counter is that of an instruction, even the first of a function.
    #[test]
    fn a_signal_frame_leads_to_the_interrupted_instruction() {
        let signal = Rules::new(Cfa::Loaded { register: Register::RSP, offset: 8, plus: 0 })
            .return_address(Place::at(Register::RSP, 16))
            .saved(Register::RBP, Place::at(Register::RSP, 0))
            .kind(Kind::Signal);
        let maps = maps(vec![
            FrameMap::new(code(1)).rules(Rules::new(Cfa::rsp(8))),
            FrameMap::new(0x1fff..0x2100).rules(signal), // from one byte before, as in libc
            FrameMap::new(code(3)).rules(Rules::new(Cfa::rbp(16))),
            base(),
        ]);
        // The interrupted rsp is below: the handler ran on another stack.
        let stack = [0x9010, 0, 0, 0x2000, STACK - 8, STACK - 8, 0x3000];
        let start = Registers::new(0x1000, STACK + 24).with(Register::RBP, 1);
        walk(&maps, &start, &stack, |frames, end| {
            assert_eq!(end, End::Base);
            let pcs: Vec<_> = frames.iter().map(|frame| (frame.pc(), frame.code())).collect();
            assert_eq!(pcs, [(0x1000, 0x1000), (0x2000, 0x1fff), (0x3000, 0x3000), (0x9010, 0x900f)]);
            assert_eq!(frames[2].register(1), Location::Memory(STACK + 32));
            assert_eq!(frames[2].range(), STACK - 8..STACK + 8);
        });
    }

    #[test]
    fn a_linkage_table_has_pushed_one_word_or_none() {
        let maps = maps(vec![FrameMap::new(code(1)).rules(Rules::new(Cfa::Plt { pushed: 11 })), base()]);
        for (pc, words) in [(0x1010, 1), (0x101a, 1), (0x101b, 2), (0x101f, 2), (0x1020, 1)] {
            walk(&maps, &Registers::new(pc, STACK), &[0x9010, 0x9010, 0], |frames, _| {
                assert_eq!(frames[0].range().len(), words * WORD, "{pc:#x}");
            });
        }
    }

    #[test]
    fn a_walk_says_why_it_cannot_go_on() {
        let stuck = |rules: Rules, stack: &[usize], why: Stuck| {
            let maps = maps(vec![
                FrameMap::new(code(1)).rules(rules),
                FrameMap::new(code(2)).unwalkable(Unwalkable::StackPointer),
                base(),
            ]);
            walk(&maps, &Registers::new(0x1000, STACK), stack, |_, end| match end {
                End::Stuck { why: found, .. } => assert_eq!(found, why),
                _ => panic!("{end:?} instead of {why:?}"),
            });
        };
        let leaf = Rules::new(Cfa::rsp(8));
        stuck(leaf, &[0x7777], Stuck::NoMap);
        stuck(leaf, &[0], Stuck::NoMap);
        stuck(leaf, &[0x2010], Stuck::Rules(Unwalkable::StackPointer));
        stuck(leaf, &[], Stuck::Memory(STACK));
        stuck(Rules::new(Cfa::rbp(16)), &[0; 9], Stuck::Register(Register::RBP));
        stuck(Rules::new(Cfa::Register(Register::R10, 0)), &[0; 9], Stuck::Register(Register::R10));
        stuck(Rules::new(Cfa::rsp(0)), &[0x1010; 9], Stuck::NoProgress);
        stuck(Rules::new(Cfa::rsp(-8)), &[0x1010; 9], Stuck::NoProgress);
        let lost = Rules::new(Cfa::rbp(16)).saved(Register::RBP, Place::UNDEFINED);
        stuck(lost, &[0x1010; 9], Stuck::Register(Register::RBP));
    }

    /// A signal frame may lead down, but not round and round for ever.
    #[test]
    fn a_circle_ends() {
        let circle =
            Rules::new(Cfa::Loaded { register: Register::RSP, offset: 0, plus: 0 }).kind(Kind::Signal);
        let maps = maps(vec![FrameMap::new(code(1)).rules(circle)]);
        let reader = maps.read();
        let memory = |address| Some(if address == STACK { STACK } else { 0x1010 });
        let mut walk = Walk::new(&reader, &Registers::new(0x1000, STACK), memory);
        assert!(walk.by_ref().count() as u32 <= MOST_STACKS);
        assert_eq!(walk.end(), Some(End::Stuck { pc: 0x1010, why: Stuck::NoProgress }));
    }

    #[test]
    fn a_return_address_that_is_undefined_ends_the_walk() {
        let outermost = Rules::new(Cfa::rsp(8)).return_address(Place::UNDEFINED);
        let maps = maps(vec![FrameMap::new(code(1)).rules(outermost)]);
        walk(&maps, &Registers::new(0x1000, STACK), &[0], |frames, end| {
            assert_eq!((frames.len(), end), (1, End::Outermost));
            assert_eq!(frames[0].return_address(), None);
        });
    }
}
