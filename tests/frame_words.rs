//! What maps say of the words and registers of frames, on stacks made by hand.

use regrow::map::{Cfa, Frame, FrameMap, Place, Register, Registers, Rules, StackMaps, Verdict, Walk, Word};

const CODE: usize = 0x1000;
const RSP: usize = 0x8000;

/// `push rbp; mov rbp, rsp; sub rsp, 32`, or that without the frame pointer.
fn rules(with_frame_pointer: bool) -> Rules {
    let cfa = if with_frame_pointer { Cfa::rbp(16) } else { Cfa::rsp(48) };
    Rules::new(cfa).saved(Register::RBP, Place::cfa(-16))
}

/// Looks at the frame of four words, a saved rbp and a return address that such a map is for.
fn look<R>(map: FrameMap, look: impl FnOnce(&Frame<'_>) -> R) -> R {
    let maps = StackMaps::new();
    let _registration = maps.register(vec![map]).unwrap();
    let reader = maps.read();
    let start = Registers::new(CODE, RSP).with(Register::RBP, RSP + 32).with(Register::RBX, 0);
    let frame = Walk::new(&reader, &start, |_| Some(0)).next().unwrap();
    look(&frame)
}

fn verdicts(map: FrameMap) -> [Verdict; 4] {
    look(map, |frame| {
        assert_eq!(frame.word(RSP + 32), Word::Saved(Register::RBP));
        assert_eq!(frame.word(RSP + 40), Word::ReturnAddress);
        [0, 8, 16, 24].map(|offset| match frame.word(RSP + offset) {
            Word::Own(verdict) => verdict,
            other => panic!("{other:?} at {offset}"),
        })
    })
}

#[test]
fn a_word_named_from_two_registers_has_the_stronger_verdict() {
    use Verdict::{Ambiguous, Data, Pointer};
    for rest in [Ambiguous, Data] {
        let map = || FrameMap::new(CODE..CODE + 16).rules(rules(true)).rest(rest);
        // From rbp the first and the last word, so that the run of them bridges the others.
        let bridged = map()
            .word(Place::at(Register::RBP, -32), Data)
            .word(Place::at(Register::RBP, -8), Data)
            .word(Place::at(Register::RSP, 8), Pointer)
            .word(Place::cfa(-32), Ambiguous);
        assert_eq!(verdicts(bridged), [Data, Pointer, if rest == Data { Ambiguous } else { rest }, Data]);
        for (one, other, expected) in [
            (Pointer, Data, Pointer),
            (Pointer, Ambiguous, Pointer),
            (Data, Ambiguous, if rest == Data { Ambiguous } else { Data }),
        ] {
            for (from_rsp, from_rbp) in [(one, other), (other, one)] {
                let map = map()
                    .word(Place::at(Register::RSP, 8), from_rsp)
                    .word(Place::at(Register::RBP, -24), from_rbp);
                assert_eq!(verdicts(map), [rest, expected, rest, rest], "{from_rsp:?} {from_rbp:?}");
            }
        }
    }
}

#[test]
fn the_register_that_the_frame_is_counted_from_is_a_pointer() {
    let rbp = Register::RBP.saved_index().unwrap();
    for registers in [Verdict::Data, Verdict::Ambiguous, Verdict::Pointer] {
        for with_frame_pointer in [true, false] {
            let map = FrameMap::new(CODE..CODE + 16).rules(rules(with_frame_pointer)).registers(registers);
            let expected = if with_frame_pointer { Verdict::Pointer } else { registers };
            look(map.rest(Verdict::Data), |frame| {
                assert_eq!(frame.map().register(rbp), expected);
                assert!(frame.owns(rbp));
                assert_eq!(frame.is_precise(), expected != Verdict::Ambiguous);
            });
        }
    }
}

#[test]
fn a_call_that_faults_at_its_push_has_the_map_of_its_return() {
    let map = FrameMap::at_return(CODE + 5).rules(rules(true)).rest(Verdict::Pointer);
    let maps = StackMaps::new();
    let _registration = maps.register(vec![map]).unwrap();
    let reader = maps.read();
    let frame_at = |pc| {
        let start = Registers::new(pc, RSP).with(Register::RBP, RSP + 32);
        Walk::new(&reader, &start, |_| Some(0)).next().map(|frame| (frame.range(), frame.word(RSP)))
    };
    assert_eq!(frame_at(CODE + 5 - 1), Some((RSP..RSP + 48, Word::Own(Verdict::Pointer))));
    assert_eq!(frame_at(CODE), None);
    assert_eq!(frame_at(CODE + 5), None);
}
