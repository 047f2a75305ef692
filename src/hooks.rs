//! What torture asks of the rest of the crate. Without the feature all of it is constant, and costs nothing.
//!
//! Torture stands on top of the crate, so nothing below may name it. It leaves two flags of the thread here, and a table of
//! functions for the fault handler.
#![forbid(unsafe_code)]

#[cfg(not(feature = "torture"))]
pub(crate) use off::*;
#[cfg(feature = "torture")]
pub(crate) use on::*;

#[cfg(not(feature = "torture"))]
mod off {
    use crate::context::Context;
    use crate::stats::WordsByMap;

    pub(crate) struct Undisturbed;

    pub(crate) fn undisturbed() -> Undisturbed {
        Undisturbed
    }

    pub(crate) fn count_words(_: &WordsByMap) {}

    pub(crate) fn is_tortured() -> bool {
        false
    }

    pub(crate) fn smallest_steps() -> bool {
        false
    }

    pub(crate) fn catches(_: usize, _: &mut Context<'_>) -> bool {
        false
    }

    pub(crate) struct InPlace;

    pub(crate) fn instruction_in_its_place(_: &mut Context<'_>) -> InPlace {
        InPlace
    }
}

#[cfg(feature = "torture")]
mod on {
    use core::cell::Cell;
    use std::sync::OnceLock;

    use crate::context::Context;
    use crate::stats::WordsByMap;

    /// What the fault handler asks torture.
    pub(crate) struct Table {
        /// Whether a fault at this address is a finding. If so it has been dealt with.
        pub catches: fn(usize, &mut Context<'_>) -> bool,
        /// Puts an instruction back that runs elsewhere since a breakpoint is in its place; returns where that is.
        pub put_instruction_back: fn(&mut Context<'_>) -> Option<usize>,
        /// Puts the breakpoint there again.
        pub put_breakpoint_back: fn(usize),
    }

    /// Empty until the first torture. The handlers only read it, which waits for nobody.
    static TABLE: OnceLock<Table> = OnceLock::new();

    /// The first call counts.
    pub(crate) fn install(table: Table) {
        let _ = TABLE.set(table);
    }

    fn table() -> Option<&'static Table> {
        TABLE.get()
    }

    /// What the torture of a thread wants of the code below.
    #[derive(Clone, Copy, Default)]
    pub(crate) struct Flags {
        /// It runs.
        pub tortured: bool,
        /// Stacks grow by no more than one fault asks for.
        pub smallest_steps: bool,
    }

    // All of these are constant and without a destructor, so that a handler may use them.
    thread_local! {
        static FLAGS: Cell<Flags> = const { Cell::new(Flags { tortured: false, smallest_steps: false }) };
        /// How many things are under way that a move would disturb.
        static UNDISTURBED: Cell<u32> = const { Cell::new(0) };
        /// The words of all stacks that were moved on this thread since its torture began.
        static WORDS: Cell<WordsByMap> = const { Cell::new(WordsByMap::NONE) };
    }

    pub(crate) fn set_flags(flags: Flags) {
        FLAGS.set(flags);
    }

    pub(crate) fn is_tortured() -> bool {
        FLAGS.get().tortured
    }

    pub(crate) fn smallest_steps() -> bool {
        FLAGS.get().smallest_steps
    }

    /// While it lives no stack of this thread is moved by torture.
    pub(crate) struct Undisturbed(());

    pub(crate) fn undisturbed() -> Undisturbed {
        UNDISTURBED.set(UNDISTURBED.get() + 1);
        Undisturbed(())
    }

    impl Drop for Undisturbed {
        fn drop(&mut self) {
            UNDISTURBED.set(UNDISTURBED.get() - 1);
        }
    }

    pub(crate) fn may_disturb() -> bool {
        UNDISTURBED.get() == 0
    }

    /// Counts the words of one move.
    pub(crate) fn count_words(words: &WordsByMap) {
        let before = WORDS.get();
        WORDS.set(WordsByMap {
            pointers: before.pointers.wrapping_add(words.pointers),
            elsewhere: before.elsewhere.wrapping_add(words.elsewhere),
            data: before.data.wrapping_add(words.data),
            ambiguous: before.ambiguous.wrapping_add(words.ambiguous),
        });
    }

    /// The words that were counted since the last call.
    pub(crate) fn take_words() -> WordsByMap {
        WORDS.replace(WordsByMap::NONE)
    }

    pub(crate) fn catches(address: usize, context: &mut Context<'_>) -> bool {
        table().is_some_and(|table| (table.catches)(address, context))
    }

    /// An instruction is in its own place until this is dropped.
    pub(crate) struct InPlace(Option<(usize, &'static Table)>);

    /// For a fault in an instruction that runs elsewhere since a breakpoint is in its place: puts it back there for as long as
    /// the fault is dealt with, since what is known about code is known by its place. It runs into the breakpoint again.
    pub(crate) fn instruction_in_its_place(context: &mut Context<'_>) -> InPlace {
        InPlace(table().and_then(|table| Some(((table.put_instruction_back)(context)?, table))))
    }

    impl Drop for InPlace {
        fn drop(&mut self) {
            if let Some((at, table)) = self.0 {
                (table.put_breakpoint_back)(at);
            }
        }
    }
}
