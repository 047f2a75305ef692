//! Runs code that a compiler made, and at a call rewrites what its frame map says are pointers.
//!
//! A function under test is given pointers into [`Objects::old`]. It calls [`callee`], which moves the
//! objects: every pointer word and pointer register of the calling frame that points to `old` is made to
//! point to `new`. Old and new objects differ, so what the function computes afterwards tells whether the map
//! named *every* copy of each pointer.

use std::cell::RefCell;

use regrow::map::recorded::{Base, Frame, Verdict};

/// What the code's pointers point to, before and after the move.
pub struct Objects {
    pub old: Box<[u64; 8]>,
    pub new: Box<[u64; 8]>,
}

thread_local! {
    static MOVE: RefCell<Option<Move>> = const { RefCell::new(None) };
}

struct Move {
    frames: Vec<Frame>,
    objects: Objects,
    log: Vec<Stop>,
}

/// What [`callee`] found in the frame that called it.
#[derive(Debug)]
pub struct Stop {
    /// Where the call returns to.
    pub return_address: u64,
    /// Pointer words that pointed to old objects.
    pub words: usize,
    /// Pointer registers that pointed to old objects.
    pub registers: usize,
    /// The word that the frame's size says is its own return address.
    pub callers_return_address: Option<u64>,
    /// The callee-saved registers that point into the frame, less `rbp`, by their DWARF numbers: addresses of
    /// stack objects that wait there for the call to return.
    pub stack_addresses: Vec<u16>,
}

/// Runs `code` with `frames` in force; returns its result and what was found at each call, in order.
pub fn run(frames: Vec<Frame>, objects: Objects, code: impl FnOnce(*mut u64) -> u64) -> (u64, Vec<Stop>) {
    let old = objects.old.as_ptr().cast_mut();
    MOVE.set(Some(Move { frames, objects, log: Vec::new() }));
    let result = code(old);
    (result, MOVE.take().unwrap().log)
}

/// What a function under test calls. Its argument, if any, is ignored.
#[unsafe(naked)]
pub unsafe extern "C" fn callee() {
    core::arch::naked_asm!(
        "push rbp", // saved[5]
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15", // saved[0]
        "mov rdi, rsp",
        "lea rsi, [rsp + 48]",
        "sub rsp, 8",
        "call {stop}",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
        stop = sym stop,
    )
}

/// The DWARF numbers of the registers as [`callee`] saves them.
const SAVED: [u16; 6] = [15, 14, 13, 12, 3, 6];

extern "C" fn stop(saved: &mut [u64; 6], return_slot: *mut u64) {
    MOVE.with_borrow_mut(|state| {
        let Move { frames, objects, log } = state.as_mut().unwrap();
        // SAFETY: `callee` passes the address of its own return address.
        let return_address = unsafe { return_slot.read() };
        let frame = frames.iter().find(|frame| frame.return_address == return_address);
        let Some(frame) = frame else { panic!("no frame for {return_address:#x}: {frames:#x?}") };
        let value = |base: Base| match base {
            Base::Rsp => return_slot.addr() as u64 + 8,
            _ => saved[SAVED.iter().position(|&register| register == base.dwarf()).unwrap()],
        };
        let distance = (objects.new.as_ptr() as u64).wrapping_sub(objects.old.as_ptr() as u64);
        let old = objects.old.as_ptr_range();
        let is_old = |word: u64| (old.start as u64..old.end as u64).contains(&word);
        let mut found = Stop {
            return_address,
            words: 0,
            registers: 0,
            callers_return_address: None,
            stack_addresses: vec![],
        };
        for word in frame.words.iter().filter(|word| word.verdict == Verdict::Pointer) {
            let place = value(word.base).wrapping_add_signed(word.offset.into()) as *mut u64;
            // SAFETY: the map says that this is a word of the frame that is stopped in the call to us. If it
            // lies, the test that this is part of has found what it looks for.
            let pointer = unsafe { &mut *place };
            if is_old(*pointer) {
                *pointer = pointer.wrapping_add(distance);
                found.words += 1;
            }
        }
        if let Some(size) = frame.size {
            let inside = value(Base::Rsp)..value(Base::Rsp) + size;
            // SAFETY: likewise.
            found.callers_return_address = Some(unsafe { (inside.end as *const u64).read() });
            let addresses = SAVED.into_iter().zip(*saved).filter(|(_, value)| inside.contains(value));
            found.stack_addresses =
                addresses.map(|(register, _)| register).filter(|&register| register != 6).collect();
        }
        for (place, register) in saved.iter_mut().zip(SAVED) {
            if frame.registers.contains(register) && is_old(*place) {
                *place = place.wrapping_add(distance);
                found.registers += 1;
            }
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
    pub fn new(size: usize, write: impl FnOnce(u64, &mut [u8])) -> Self {
        // SAFETY: a fresh private mapping at an address of the kernel's choice, filled before anything
        // else can know it.
        unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let address = libc::mmap(core::ptr::null_mut(), size, protection, flags, -1, 0);
            assert_ne!(address, libc::MAP_FAILED);
            write(address as u64, core::slice::from_raw_parts_mut(address.cast(), size));
            assert_eq!(libc::mprotect(address, size, libc::PROT_READ | libc::PROT_EXEC), 0);
            Self { address: address.cast(), size }
        }
    }

    pub fn address(&self) -> u64 {
        self.address as u64
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        // SAFETY: ours, and the tests do not keep functions longer than the code.
        unsafe { libc::munmap(self.address.cast(), self.size) };
    }
}
