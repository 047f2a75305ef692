//! Runs code that a compiler made, and at a call rewrites what its frame map says are pointers.
//!
//! A function under test is given pointers into [`Objects::old`]. It calls [`callee`], which moves the
//! objects: every pointer word and pointer register of the calling frame that points to `old` is made to
//! point to `new`. Old and new objects differ, so what the function computes afterwards tells whether the map
//! named *every* copy of each pointer. The frame is found by a walk, with the maps of the process, which must go on to the
//! end of the thread.
#![allow(dead_code, reason = "each test binary uses its own part of this")]

use std::cell::RefCell;
use std::sync::OnceLock;

use regrow::map::{
    self, Cfa, End, FrameMap, Location, Register, Registers, Registration, Rules, Source, Verdict, Walk, Word,
};

/// What the code's pointers point to, before and after the move.
pub struct Objects {
    pub old: Box<[usize; 8]>,
    pub new: Box<[usize; 8]>,
}

impl Objects {
    /// 900 each before the move, 1 to 8 after.
    pub fn new() -> Self {
        Self { old: Box::new([900; 8]), new: Box::new([1, 2, 3, 4, 5, 6, 7, 8]) }
    }
}

thread_local! {
    static MOVE: RefCell<Option<Move>> = const { RefCell::new(None) };
}

struct Move {
    objects: Objects,
    log: Vec<Stop>,
}

/// What [`callee`] found in the frame that called it.
#[derive(Debug)]
pub struct Stop {
    /// Where the call returns to.
    pub return_address: usize,
    pub source: Source,
    /// From the stack pointer to the frame's own return address.
    pub size: usize,
    pub is_precise: bool,
    /// Words by verdict: pointers, ambiguous.
    pub pointers: usize,
    pub ambiguous: usize,
    /// Pointer words that pointed to old objects.
    pub words: usize,
    /// Pointer registers that pointed to old objects.
    pub registers: usize,
    /// The callee-saved registers that point into the frame, less `rbp`: addresses of stack objects that wait there for
    /// the call to return.
    pub stack_addresses: Vec<Register>,
}

/// Runs `code`; returns its result and what was found at each call, in order.
pub fn run(objects: Objects, code: impl FnOnce(*mut usize) -> usize) -> (usize, Vec<Stop>) {
    static CALLEE: OnceLock<Registration<'static>> = OnceLock::new();
    CALLEE.get_or_init(|| {
        map::record_loaded_objects();
        let entry = callee as *const () as usize;
        let map = FrameMap::new(entry..entry + 1).rules(Rules::new(Cfa::rsp(8)));
        // SAFETY: at a function's entry the frame holds the return address alone.
        unsafe { map::register(vec![map]) }.unwrap()
    });
    let old = objects.old.as_ptr().cast_mut();
    MOVE.set(Some(Move { objects, log: Vec::new() }));
    let result = code(old);
    (result, MOVE.take().unwrap().log)
}

/// What a function under test calls. Its argument, if any, is ignored.
#[unsafe(naked)]
pub unsafe extern "C" fn callee() {
    core::arch::naked_asm!(
        "pushfq", // with the trap flag, if our caller is stepped through: we are not
        "pushfq",
        "and dword ptr [rsp], 0xfffffeff",
        "popfq",
        "push r15",
        "push r14",
        "push r13",
        "push r12",
        "push rbp",
        "push rbx", // in the order of Register::CALLEE_SAVED
        "mov rdi, rsp",
        "lea rsi, [rsp + 56]",
        "call {stop}",
        "pop rbx",
        "pop rbp",
        "pop r12",
        "pop r13",
        "pop r14",
        "pop r15",
        "popfq",
        "ret",
        stop = sym stop,
    )
}

/// Reads this process's memory.
pub fn memory(address: usize) -> Option<usize> {
    let readable = address.is_multiple_of(8) && address > 4096;
    // SAFETY: the tests ask for words of stacks that are in use; a walker that errs crashes its test.
    readable.then(|| unsafe { *(address as *const usize) })
}

extern "C" fn stop(saved: &mut [usize; 6], return_slot: *mut usize) {
    // As it was at the callee's first instruction.
    let start = Registers::new(callee as *const () as usize, return_slot.addr());
    let start =
        Register::CALLEE_SAVED.iter().zip(*saved).fold(start, |all, (one, value)| all.with(*one, value));
    let reader = map::process().read();
    let mut walk = Walk::new(&reader, &start, memory);
    assert_eq!(walk.next().map(|frame| frame.pc()), Some(callee as *const () as usize));
    let Some(frame) = walk.next() else { panic!("no frame: {:?}", walk.end()) };
    walk.by_ref().for_each(drop);
    assert_eq!(walk.end(), Some(End::Outermost));
    MOVE.with_borrow_mut(|state| {
        let Move { objects, log } = state.as_mut().unwrap();
        let distance = objects.new.as_ptr().addr().wrapping_sub(objects.old.as_ptr().addr());
        let old = objects.old.as_ptr_range();
        let moved = |word: &mut usize| {
            let is_old = (old.start.addr()..old.end.addr()).contains(word);
            *word = word.wrapping_add(if is_old { distance } else { 0 });
            usize::from(is_old)
        };
        let range = frame.range();
        let owned = |index: &usize| frame.owns(*index);
        let mut found = Stop {
            return_address: frame.pc(),
            source: frame.map().source(),
            size: range.len() - 8,
            is_precise: frame.is_precise(),
            pointers: 0,
            ambiguous: 0,
            words: 0,
            registers: 0,
            stack_addresses: (0..6)
                .filter(owned)
                .filter(|&index| range.contains(&saved[index]))
                .map(|index| Register::CALLEE_SAVED[index])
                .filter(|register| *register != Register::RBP)
                .collect(),
        };
        for address in range.step_by(8) {
            match frame.word(address) {
                Word::Own(Verdict::Pointer) => {
                    found.pointers += 1;
                    // SAFETY: a word of the frame that is stopped in the call to us. If the map lies, the test that
                    // this is part of has found what it looks for.
                    found.words += moved(unsafe { &mut *(address as *mut usize) });
                }
                Word::Own(Verdict::Ambiguous) => found.ambiguous += 1,
                Word::Own(Verdict::Data) | Word::ReturnAddress | Word::Saved(_) => {}
            }
        }
        for index in (0..6).filter(owned).filter(|&index| frame.map().register(index) == Verdict::Pointer) {
            assert_eq!(frame.register(index), Location::Register);
            found.registers += moved(&mut saved[index]);
        }
        log.push(found);
    });
}

/// Executable memory.
pub struct Code {
    address: *mut u8,
    size: usize,
}

impl Code {
    /// Maps room for `size` bytes of code, lets `write` fill them, and makes them executable.
    pub fn new(size: usize, write: impl FnOnce(usize, &mut [u8])) -> Self {
        // SAFETY: a fresh private mapping at an address of the kernel's choice, filled before anything
        // else can know it.
        unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let address = libc::mmap(core::ptr::null_mut(), size, protection, flags, -1, 0);
            assert_ne!(address, libc::MAP_FAILED);
            write(address.addr(), core::slice::from_raw_parts_mut(address.cast(), size));
            assert_eq!(libc::mprotect(address, size, libc::PROT_READ | libc::PROT_EXEC), 0);
            Self { address: address.cast(), size }
        }
    }

    pub fn address(&self) -> usize {
        self.address.addr()
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped, readable, and not written any more.
        unsafe { core::slice::from_raw_parts(self.address, self.size) }
    }

    pub fn contains(&self, address: usize) -> bool {
        (self.address()..self.address() + self.size).contains(&address)
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        // SAFETY: ours, and the tests do not keep functions longer than the code.
        unsafe { libc::munmap(self.address.cast(), self.size) };
    }
}
