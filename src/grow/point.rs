//! Growth points: instructions at which a stack may overflow and may be moved.
//!
//! A growth point is a push, a call, or an instruction whose memory operand is based on `rsp` (prologue
//! probes among them). Compilers emit these where every pointer is whole. At other instructions a register
//! may hold the difference of two pointers (as in glibc's memcpy), which cannot be found by its value.
//!
//! This code reads only those bytes of an instruction that decide, and never past its end. The encoding is that of the
//! Intel 64 manual, volume 2, chapter 2 and appendix A. The tests compare it with iced-x86 on random instructions.

//!
//! Some growth points use another register, too. The prologue of a frame of many pages touches each page
//! in a loop. A register holds the loop's end: an address as far below `rsp` as the frame is large.
//!
//! ```text
//!       lea  r11, [rsp - 0x18000]      far outside the slot of a small stack, so outside any window
//!   1:  sub  rsp, 0x1000
//!       mov  qword ptr [rsp], 0        the growth point
//!       cmp  rsp, r11                  only this shows that r11 moves with rsp
//!       jne  1b
//! ```
#![forbid(unsafe_code)]

/// The verdict on moving at an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Point {
    /// It is a growth point.
    Yes,
    /// Its memory operand is based on `rbp`: a growth point if `rbp`
    /// points to the function's frame, which only its unwind data shows.
    IfFramePointer,
    /// It may not move here: registers may hold anything.
    No,
}

/// Whether the instruction whose bytes `byte` returns is a growth point.
pub(crate) fn growth_point(byte: impl Fn(usize) -> u8) -> Point {
    let mut at = 0;
    let mut base_extended = false; // REX.B or an equivalent: base number 4 then means r12, not rsp
    let opcode = loop {
        match byte(at) {
            rex @ 0x40..=0x4f => base_extended = rex & 1 != 0,
            prefix if is_prefix(prefix) => base_extended = false, // only a REX right before the opcode counts
            opcode => break opcode,
        }
        at += 1;
        if at > 14 {
            return Point::No;
        }
    };
    let operand = match opcode {
        0x0f => match byte(at + 1) {
            0xa0 | 0xa8 => return Point::Yes, // push fs, push gs
            0x38 | 0x3a => Some(at + 3),
            second => has_modrm_0f(second).then_some(at + 2),
        },
        // VEX and EVEX: B is inverted. All have a ModRM byte except vzeroupper and vzeroall.
        0xc5 => (byte(at + 2) != 0x77).then_some(at + 3),
        0xc4 => {
            base_extended = byte(at + 1) & 0x20 == 0;
            Some(at + 4)
        }
        0x62 => {
            base_extended = byte(at + 1) & 0x20 == 0;
            Some(at + 5)
        }
        0x50..=0x57 | 0x68 | 0x6a | 0x9c | 0xe8 | 0xc8 => return Point::Yes, // push, pushf, call, enter
        0xff if matches!(byte(at + 1) >> 3 & 7, 2 | 3 | 6) => return Point::Yes, // call, call far, push
        _ => has_modrm(opcode).then_some(at + 1),
    };
    match operand.filter(|_| !base_extended).map(|modrm| (byte(modrm), modrm + 1)) {
        Some((modrm, sib)) if is_based_on(RSP, modrm, || byte(sib)) => Point::Yes,
        Some((modrm, sib)) if is_based_on(RBP, modrm, || byte(sib)) => Point::IfFramePointer,
        _ => Point::No,
    }
}

/// The length of a call in bytes; 0 for any other instruction.
pub(crate) fn call_length(byte: impl Fn(usize) -> u8) -> usize {
    let rex = usize::from(matches!(byte(0), 0x40..=0x4f));
    match byte(rex) {
        0xe8 => rex + 5,
        0xff if byte(rex + 1) >> 3 & 7 == 2 => rex + 2 + operand_length(byte(rex + 1), || byte(rex + 2)),
        _ => 0,
    }
}

/// How many bytes of an operand follow its ModRM byte.
fn operand_length(modrm: u8, sib: impl Fn() -> u8) -> usize {
    let has_sib = modrm >> 6 != 3 && modrm & 7 == 4;
    let displacement = match modrm >> 6 {
        0 if modrm & 7 == 5 || has_sib && sib() & 7 == 5 => 4,
        1 => 1,
        2 => 4,
        _ => 0,
    };
    usize::from(has_sib) + displacement
}

/// The number of the register that holds the end of a probe loop, for a growth point inside
/// one. The loops of LLVM, GCC (frames and variable-length arrays) and Cranelift are known.
pub(crate) fn probe_loop_end(byte: impl Fn(usize) -> u8) -> Option<usize> {
    let rex = usize::from(matches!(byte(0), 0x48 | 0x4c));
    let immediate = match byte(rex) {
        0xc7 | 0x81 => 4,
        0x83 => 1,
        0x89 | 0x09 | 0x85 => 0, // a register stored, ored or tested
        _ => return None,
    };
    let modrm = byte(rex + 1);
    if !is_based_on(RSP, modrm, || byte(rex + 2)) || byte(rex + 2) != 0x24 {
        return None;
    }
    let displacement = [0, 1, 4][usize::from(modrm >> 6)];
    let next = rex + 3 + displacement + immediate;
    // The bytes are read one by one: the next instruction may be short, and the last one of its page.
    let rex = byte(next);
    if rex & 0xf8 != 0x48 || !matches!(byte(next + 1), 0x39 | 0x3b) {
        return None;
    }
    let modrm = byte(next + 2);
    if modrm >> 6 != 3 {
        return None;
    }
    let reg = usize::from(modrm >> 3 & 7 | (rex & 4) << 1);
    let rm = usize::from(modrm & 7 | (rex & 1) << 3);
    match (reg, rm) {
        (RSP, other) | (other, RSP) => Some(other),
        _ => None,
    }
}

/// The number of `rsp` among the general registers, in the encoding of instructions.
const RSP: usize = 4;
const RBP: usize = 5;

fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}

/// True for a memory operand whose base is `rsp` or `rbp`. `rsp` always comes in
/// a SIB byte. Without a displacement the encoding of `rbp` has another meaning.
fn is_based_on(base: usize, modrm: u8, sib: impl Fn() -> u8) -> bool {
    let mode = modrm >> 6;
    let number = match modrm & 7 {
        _ if mode == 3 => return false,
        4 => sib() & 7,
        number => number,
    };
    usize::from(number) == base && (base != RBP || mode != 0)
}

fn has_modrm(opcode: u8) -> bool {
    match opcode {
        0x00..=0x3f => opcode & 7 < 4,
        0x63 | 0x69 | 0x6b | 0x80..=0x8f | 0xc0 | 0xc1 | 0xc6 | 0xc7 | 0xd0..=0xd3 | 0xd8..=0xdf => true,
        0xf6 | 0xf7 | 0xfe | 0xff => true,
        _ => false,
    }
}

fn has_modrm_0f(opcode: u8) -> bool {
    !matches!(
        opcode,
        0x04..=0x0c
            | 0x0e
            | 0x20..=0x23
            | 0x30..=0x37
            | 0x77
            | 0x80..=0x8f
            | 0xa0..=0xa2
            | 0xa8..=0xaa
            | 0xc8..=0xcf
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
    use proptest::prelude::*;

    fn expected(instruction: &Instruction) -> Point {
        let pushes = matches!(
            instruction.mnemonic(),
            Mnemonic::Push | Mnemonic::Pushf | Mnemonic::Pushfq | Mnemonic::Call | Mnemonic::Enter
        );
        let memory = (0..instruction.op_count()).any(|op| instruction.op_kind(op) == OpKind::Memory);
        match instruction.memory_base() {
            _ if pushes => Point::Yes,
            Register::RSP if memory => Point::Yes,
            Register::RBP if memory => Point::IfFramePointer,
            _ => Point::No,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200_000, max_global_rejects: u32::MAX, ..Default::default() })]

        /// Every instruction that iced-x86 can decode is judged as by iced-x86, and no byte past its end is read.
        #[test]
        fn agrees_with_iced_on_random_bytes(mut bytes in prop::array::uniform16(any::<u8>()), shape in 0..8u8) {
            // Half of the cases are steered to rsp-based operands, which are rare among random bytes.
            match shape {
                0 => bytes[2] = 0x24,
                1 => bytes[3] = 0x24,
                2 => (bytes[0], bytes[1]) = (0xc5, bytes[1]),
                3 => (bytes[0], bytes[1], bytes[6]) = (0x62, bytes[1] & 0xf7 | 0x01, 0x24),
                _ => {}
            }
            let mut decoder = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE);
            let instruction = decoder.decode();
            prop_assume!(!instruction.is_invalid());
            // Except 32-bit addressing and the exotic lea of a segment register, which no compiler emits.
            prop_assume!(![Register::ESP, Register::EBP].contains(&instruction.memory_base()));
            let found = growth_point(|at| {
                assert!(at < instruction.len(), "read byte {at} of {instruction} ({bytes:02x?})");
                bytes[at]
            });
            prop_assert_eq!(found, expected(&instruction), "{} {:02x?}", instruction, bytes);
        }
    }

    proptest! {
        #[test]
        fn calls_are_as_long_as_iced_says(mut bytes in prop::array::uniform16(any::<u8>()), shape in 0..4u8) {
            match shape {
                0 => bytes[0] = 0xe8,
                1 => (bytes[0], bytes[1]) = (0xff, bytes[1] & 0xc7 | 0x10),
                2 => (bytes[0], bytes[1], bytes[2]) = (0x41, 0xff, bytes[2] & 0xc7 | 0x10),
                _ => {}
            }
            let instruction = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE).decode();
            prop_assume!(!instruction.is_invalid());
            prop_assume!(!(0x64..=0x67).contains(&bytes[0]) && !is_prefix(bytes[0]));
            prop_assume!(bytes[0] & 0xf0 != 0x40 || bytes[1] & 0xf0 != 0x40 && !is_prefix(bytes[1]));
            let near = instruction.mnemonic() == Mnemonic::Call && !instruction.is_call_far_indirect();
            let expected = if near { instruction.len() } else { 0 };
            prop_assert_eq!(call_length(|at| bytes[at]), expected, "{} {:02x?}", instruction, bytes);
        }
    }

    #[test]
    fn the_end_of_a_probe_loop_is_found() {
        let loops: [(&[u8], usize); 4] = [
            (&[0x48, 0xc7, 0x04, 0x24, 0, 0, 0, 0, 0x4c, 0x39, 0xdc], 11), // LLVM: mov [rsp], 0; cmp rsp, r11
            (&[0x48, 0x83, 0x0c, 0x24, 0, 0x4c, 0x39, 0xdc], 11),          // GCC: or [rsp], 0; cmp rsp, r11
            (&[0x48, 0x83, 0x8c, 0x24, 0xf8, 0x0f, 0, 0, 0, 0x48, 0x39, 0xd4], 2), // GCC: or [rsp+0xff8], 0; cmp rsp, rdx
            (&[0x89, 0x24, 0x24, 0x49, 0x39, 0xe3], 11), // Cranelift: mov [rsp], esp; cmp r11, rsp
        ];
        for (code, register) in loops {
            assert_eq!(probe_loop_end(|at| code[at]), Some(register), "{code:02x?}");
        }
        let others: [&[u8]; 3] = [
            &[0x48, 0xc7, 0x04, 0x24, 0, 0, 0, 0, 0x4c, 0x39, 0xd8], // cmp rax, r11
            &[0x48, 0x89, 0x04, 0x24, 0x48, 0x83, 0xc4, 0x08],       // mov [rsp], rax; add rsp, 8
            &[0x55, 0x48, 0x89, 0xe5],                               // push rbp; mov rbp, rsp
        ];
        assert!(others.iter().all(|code| probe_loop_end(|at| code[at]).is_none()));
    }

    #[test]
    fn the_usual_ones() {
        let yes: [&[u8]; 8] = [
            &[0x55],                                     // push rbp
            &[0x41, 0x57],                               // push r15
            &[0xe8, 0, 0, 0, 0],                         // call
            &[0xff, 0x15, 0, 0, 0, 0],                   // call [rip]
            &[0x48, 0x89, 0x44, 0x24, 0x08],             // mov [rsp+8], rax
            &[0x48, 0xc7, 0x04, 0x24, 0, 0, 0, 0],       // mov qword [rsp], 0: a probe
            &[0xc5, 0xfc, 0x11, 0x44, 0x24, 0x20],       // vmovups [rsp+32], ymm0
            &[0x62, 0xf1, 0x7c, 0x48, 0x11, 0x04, 0x24], // vmovups [rsp], zmm0
        ];
        let no: [&[u8]; 4] = [
            &[0x49, 0x89, 0x04, 0x24], // mov [r12], rax
            &[0xf3, 0x48, 0xab],       // rep stosq
            &[0x48, 0x89, 0x07],       // mov [rdi], rax
            &[0xc3],                   // ret
        ];
        assert!(yes.iter().all(|code| growth_point(|at| code[at]) == Point::Yes));
        assert!(no.iter().all(|code| growth_point(|at| code[at]) == Point::No));
        assert_eq!(growth_point(|at| [0x48, 0x89, 0x45, 0xf8][at]), Point::IfFramePointer); // mov [rbp-8], rax
    }
}
