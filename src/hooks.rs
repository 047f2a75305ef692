//! The hooks of torture in the rest of the crate. Without the feature all of them are constant and cost nothing.
//!
//! Torture depends on the rest of the crate, so the code below must not name it. Here it leaves two flags per thread and
//! a table of functions for the fault handler.
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

    /// The functions of torture that the fault handler calls.
    pub(crate) struct Table {
        /// Whether a fault at this address is a finding. If so, it has been dealt with.
        pub catches: fn(usize, &mut Context<'_>) -> bool,
        /// Puts an instruction back that runs elsewhere because of a breakpoint in its place. Returns its place.
        pub put_instruction_back: fn(&mut Context<'_>) -> Option<usize>,
        /// Restores the breakpoint there.
        pub put_breakpoint_back: fn(usize),
    }

    /// Empty until the first torture. The handlers only read it, without waiting.
    static TABLE: OnceLock<Table> = OnceLock::new();

    /// Installs the table. Only the first call has an effect.
    pub(crate) fn install(table: Table) {
        let _ = TABLE.set(table);
    }

    fn table() -> Option<&'static Table> {
        TABLE.get()
    }

    /// Requests of a thread's torture to the code below.
    #[derive(Clone, Copy, Default)]
    pub(crate) struct Flags {
        /// The thread is being tortured.
        pub tortured: bool,
        /// Stacks grow by no more than one fault asks for.
        pub smallest_steps: bool,
    }

    // All of these are constant and without a destructor, so a handler may use them.
    thread_local! {
        static FLAGS: Cell<Flags> = const { Cell::new(Flags { tortured: false, smallest_steps: false }) };
        /// How many operations that a move would disturb are under way.
        static UNDISTURBED: Cell<u32> = const { Cell::new(0) };
        /// The words of all stacks moved on this thread since its torture began.
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

    /// While it lives, torture moves no stack of this thread.
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

    /// The words counted since the last call.
    pub(crate) fn take_words() -> WordsByMap {
        WORDS.replace(WordsByMap::NONE)
    }

    pub(crate) fn catches(address: usize, context: &mut Context<'_>) -> bool {
        table().is_some_and(|table| (table.catches)(address, context))
    }

    pub(crate) struct InPlace(Option<(usize, &'static Table)>);

    /// For a fault in an instruction that runs elsewhere because of a breakpoint in its place. The instruction is back in
    /// its place until the result is dropped, because facts about code are found by place. Then it runs into the
    /// breakpoint again.
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
