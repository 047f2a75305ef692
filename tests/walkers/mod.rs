//! Three walkers of the same stack: ours, libgcc's (which panics and backtraces of std use), and framehop.
#![allow(dead_code)] // each test uses its part

use std::ffi::{c_int, c_void};

use framehop::x86_64::{CacheX86_64, UnwindRegsX86_64, UnwinderX86_64};
use framehop::{ExplicitModuleSectionInfo, FrameAddress, Module, Unwinder};
use regrow::map::{self, Cfa, End, Kind, Location, Register, Registers, Walk};

/// A frame as a walker sees it: where its code is, its stack pointer, and its callee-saved registers.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Step {
    pub pc: usize,
    pub rsp: usize,
    pub saved: [usize; 6],
}

impl std::fmt::Debug for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x} rsp {:#x} {:x?}", self.pc, self.rsp, self.saved)
    }
}

/// Room for a walk, where nothing may be allocated.
pub const MOST: usize = 256;

/// What a walk with ours came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Walked {
    pub frames: usize,
    /// Frames up to the first that framehop does not get past, that one included: a base, a signal frame, or one whose end is
    /// counted from a register other than rsp and rbp (the loader's lazy binding).
    pub ordinary: usize,
    /// `None`: there was no more room.
    pub end: Option<End>,
}

/// Walks with ours into `steps`.
pub fn ours(
    start: &Registers,
    across: bool,
    memory: impl Fn(usize) -> Option<usize> + Copy,
    steps: &mut [Step],
) -> Walked {
    let reader = map::process().read();
    let mut walk = Walk::new(&reader, start, memory);
    if across {
        walk = walk.across_bases();
    }
    let mut count = 0;
    let mut ordinary = None;
    while count < steps.len()
        && let Some(frame) = walk.next()
    {
        let value = |index| match frame.register(index) {
            Location::Register => start.get(Register::CALLEE_SAVED[index]),
            Location::Memory(address) => memory(address),
            Location::Lost => None,
        };
        let saved = std::array::from_fn(|index| value(index).unwrap_or(0xdead));
        steps[count] = Step { pc: frame.pc(), rsp: frame.range().start, saved };
        count += 1;
        let register = match frame.map().rules() {
            Some(Ok(rules)) => match rules.cfa() {
                Cfa::Register(register, _) | Cfa::Loaded { register, .. } => register,
                Cfa::Plt { .. } => Register::RSP,
            },
            _ => Register::RSP,
        };
        if frame.kind() != Kind::Call || (register != Register::RSP && register != Register::RBP) {
            ordinary = ordinary.or(Some(count));
        }
    }
    Walked { frames: count, ordinary: ordinary.unwrap_or(count), end: walk.end() }
}

/// Reads this process's memory.
pub fn own_memory(address: usize) -> Option<usize> {
    let readable = address.is_multiple_of(8) && address > 4096;
    // SAFETY: the tests ask for words of stacks that are in use; a walker that errs crashes its test.
    readable.then(|| unsafe { *(address as *const usize) })
}

#[repr(C)]
struct UnwindContext([u8; 0]);

unsafe extern "C" {
    fn _Unwind_Backtrace(
        visit: extern "C" fn(*mut UnwindContext, *mut c_void) -> c_int,
        argument: *mut c_void,
    ) -> c_int;
    fn _Unwind_GetIP(context: *mut UnwindContext) -> usize;
    fn _Unwind_GetCFA(context: *mut UnwindContext) -> usize;
    fn _Unwind_GetGR(context: *mut UnwindContext, register: c_int) -> usize;
}

struct Steps<'a> {
    steps: &'a mut [Step],
    count: usize,
}

extern "C" fn visit(context: *mut UnwindContext, argument: *mut c_void) -> c_int {
    // SAFETY: libgcc passes its context and our argument.
    unsafe {
        let all = &mut *argument.cast::<Steps<'_>>();
        let pc = _Unwind_GetIP(context);
        if pc != 0 && all.count < all.steps.len() {
            let saved =
                Register::CALLEE_SAVED.map(|register| _Unwind_GetGR(context, register.dwarf().into()));
            all.steps[all.count] = Step { pc, rsp: _Unwind_GetCFA(context), saved };
            all.count += 1;
        }
    }
    0
}

/// Walks from its caller with libgcc. The caller's own program counter is somewhere in it.
#[inline(always)]
pub fn libgcc(steps: &mut [Step]) -> usize {
    let mut all = Steps { steps, count: 0 };
    // SAFETY: `visit` takes this argument.
    unsafe { _Unwind_Backtrace(visit, (&raw mut all).cast()) };
    all.count
}

/// The registers of the caller, at an instruction in it.
#[inline(always)]
pub fn registers() -> Registers {
    let mut words = [0usize; 8];
    // SAFETY: writes the eight words.
    unsafe {
        std::arch::asm!(
            "lea rax, [rip]",
            "mov [rdi], rax",
            "mov [rdi + 8], rsp",
            "mov [rdi + 16], rbx",
            "mov [rdi + 24], rbp",
            "mov [rdi + 32], r12",
            "mov [rdi + 40], r13",
            "mov [rdi + 48], r14",
            "mov [rdi + 56], r15",
            in("rdi") words.as_mut_ptr(),
            out("rax") _,
            options(nostack),
        );
    }
    let start = Registers::new(words[0], words[1]);
    Register::CALLEE_SAVED.into_iter().zip(&words[2..]).fold(start, |all, (one, value)| all.with(one, *value))
}

/// The registers of an interrupted context.
pub fn interrupted(context: &libc::ucontext_t) -> Registers {
    let of = |index: c_int| context.uc_mcontext.gregs[index as usize] as usize;
    let general = [
        libc::REG_RAX,
        libc::REG_RDX,
        libc::REG_RCX,
        libc::REG_RBX,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_RBP,
        libc::REG_RSP,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    let start = Registers::new(of(libc::REG_RIP), of(libc::REG_RSP));
    (0..16)
        .zip(general)
        .fold(start, |all, (number, index)| all.with(Register::from_dwarf(number).unwrap(), of(index)))
}

/// framehop, knowing every loaded object.
pub struct Framehop {
    unwinder: UnwinderX86_64<&'static [u8]>,
    cache: CacheX86_64,
}

impl Framehop {
    pub fn new() -> Self {
        let mut unwinder = UnwinderX86_64::new();
        // SAFETY: the callback takes this argument.
        unsafe { libc::dl_iterate_phdr(Some(add_module), (&raw mut unwinder).cast()) };
        Self { unwinder, cache: CacheX86_64::new() }
    }

    /// The frames, without saved registers; true if it came to the outermost.
    pub fn walk(
        &mut self,
        start: &Registers,
        memory: impl Fn(usize) -> Option<usize>,
        most: usize,
    ) -> (Vec<Step>, bool) {
        let get = |register| start.get(register).unwrap_or_default() as u64;
        let mut registers = UnwindRegsX86_64::new(start.pc() as u64, get(Register::RSP), get(Register::RBP));
        let mut read = |address: u64| memory(address as usize).map(|word| word as u64).ok_or(());
        let mut address = FrameAddress::from_instruction_pointer(start.pc() as u64);
        let mut steps = Vec::new();
        while steps.len() < most {
            let pc = address.address() as usize;
            steps.push(Step { pc, rsp: registers.sp() as usize, saved: [0; 6] });
            match self.unwinder.unwind_frame(address, &mut registers, &mut self.cache, &mut read) {
                Ok(Some(next)) => match FrameAddress::from_return_address(next) {
                    Some(next) => address = next,
                    None => return (steps, true),
                },
                Ok(None) => return (steps, true),
                Err(_) => break,
            }
        }
        (steps, false)
    }
}

unsafe extern "C" fn add_module(info: *mut libc::dl_phdr_info, _: usize, argument: *mut c_void) -> c_int {
    // SAFETY: the loader's description of an object, which these tests never unload, and our argument.
    unsafe {
        let unwinder = &mut *argument.cast::<UnwinderX86_64<&'static [u8]>>();
        let info = &*info;
        let headers = std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into());
        let base = info.dlpi_addr;
        let bytes = |start: u64, length: u64| std::slice::from_raw_parts(start as *const u8, length as usize);
        let loaded = || headers.iter().filter(|header| header.p_type == libc::PT_LOAD);
        let Some(header) = headers.iter().find(|header| header.p_type == libc::PT_GNU_EH_FRAME) else {
            return 0;
        };
        let header_range = header.p_vaddr..header.p_vaddr + header.p_memsz;
        // The first encoded pointer of .eh_frame_hdr is, with every linker, 4 bytes relative to itself.
        let relative = *((base + header.p_vaddr + 4) as *const i32);
        let tables = (header.p_vaddr + 4).wrapping_add_signed(relative.into());
        let end =
            loaded().map(|one| one.p_vaddr..one.p_vaddr + one.p_memsz).find(|one| one.contains(&tables));
        let end = end.map_or(tables, |segment| segment.end);
        let highest = loaded().map(|one| one.p_vaddr + one.p_memsz).max().unwrap_or_default();
        unwinder.add_module(Module::new(
            format!("{base:x}"),
            base..base + highest,
            base,
            ExplicitModuleSectionInfo {
                base_svma: 0,
                eh_frame_svma: Some(tables..end),
                eh_frame: Some(bytes(base + tables, end - tables)),
                eh_frame_hdr_svma: Some(header_range.clone()),
                eh_frame_hdr: Some(bytes(base + header_range.start, header.p_memsz)),
                ..Default::default()
            },
        ));
    }
    0
}
