//! The recorder for LLVM: reads the section `.llvm_stackmaps`, version 3.
//!
//! ```text
//!   section      table, table, ...      one from each object file linked; zeros between them are skipped
//!
//!   table        0  u8   version (3), 3 bytes reserved
//!                4  u32  functions    F
//!                8  u32  constants    C
//!               12  u32  records      R
//!               16  F × function
//!                   C × u64           constants too large for a location
//!                   R × record        those of the first function, those of the second, ...
//!
//!   function     0  u64  address
//!                8  u64  stack size, all ones if dynamic
//!               16  u64  records
//!
//!   record       0  u64  id
//!                8  u32  offset of the code from the function's address
//!               12  u16  reserved
//!               14  u16  locations    L
//!               16  L × location      padded to 8 bytes
//!                   u16  padding
//!                   u16  live-outs    O
//!                   O × live-out      padded to 8 bytes
//!
//!   location     0  u8   kind, 1 byte reserved         live-out   0  u16  DWARF register, 1 byte reserved
//!                2  u16  size in bytes                            3  u8   size in bytes
//!                4  u16  DWARF register, 2 bytes reserved
//!                8  i32  offset, constant, or index of a constant
//! ```
//!
//! This is the layout of LLVM's own reader, `llvm/Object/StackMapParser.h`. Where LLVM's prose differs, the reader is right. Reading copies
//! and allocates nothing: [`tables`] checks each table once, as a whole, and returns views of the section's bytes whose iterators
//! cannot fail.
//!
//! # Which records describe frames
//!
//! The section does not say which intrinsic a record comes from, and only one of the three describes a frame:
//!
//! | intrinsic | `offset` is | its locations are | used for frames |
//! | --- | --- | --- | --- |
//! | `gc.statepoint` | the call's return address | the pointers that are live across it | yes |
//! | `patchpoint` | where the patchable bytes *begin* | values a runtime asked for, of any type | no |
//! | `stackmap` | some instruction | values a runtime asked for, of any type | no |
//!
//! No field holds the address that a patchpoint's call returns to, and the last two do not claim to list every pointer. A frame stopped in
//! such a call is judged by its unwind tables alone. [`Table::records`] still reads the records.
//!
//! A statepoint is recognised by its shape ([`Record::statepoint`]). A patchpoint whose first values are three constants looks the
//! same. If you mix the two, give statepoints ids of their own and pass a predicate to [`Table::frame_maps`].
//!
//! # What the locations of a statepoint mean here
//!
//! - `Indirect` in a pair, base or derived, is a pointer word, or several if the size is a multiple of 8. Derived pointers are interior
//!   pointers and move like others. `Register` in a pair (`-fixup-allow-gcptr-in-csr`) is a callee-saved register that
//!   holds a pointer. Constants (null) need nothing.
//! - `Direct` is the *address* of an `alloca`, as a sum to compute. No word holds it, so there is nothing to rewrite. But by listing an
//!   `alloca` as live, LLVM declares a spill slot of your own, so its first word is a pointer. Its size is not recorded: list
//!   `alloca`s of one word, each a pointer.
//! - `Indirect` and `Register` among the deopt values hold a value of any type. Its aligned words are ambiguous, and so is a callee-saved
//!   register. If a pair names the same place, it is a pointer. `Direct` there is an address and needs nothing.
//!
//! Words are counted from `rsp`. In frames of dynamic size they are counted from `rbp`, and if those are realigned too, from `rbx`, LLVM's
//! base pointer. LLVM does not record where the frame ends and where registers are saved. So the maps have no
//! [`Rules`](super::Rules) and take those of the function's unwind tables. A program's `.eh_frame` is
//! [recorded](super::record_loaded_objects) anyway; a JIT [gives](super::register_eh_frame) its own.
//!
//! # What LLVM does not record
//!
//! The map has only the pointers that the front end declares (usually those in address space 1 that a `gc.relocate` returns). LLVM
//! itself keeps *undeclared* pointers into the stack across calls. The address of an `alloca` that is used before and after a call
//! may wait in `r12`. A frame that is both realigned and of dynamic size keeps a base pointer in `rbx`. So the rest of a frame is
//! [`Verdict::Ambiguous`]. A front end may say [`Verdict::Data`], and answers for it, if all of this holds:
//!
//! - No `alloca` has its address used on both sides of a call, has a dynamic size, or is aligned to more than 16 bytes.
//! - Pointers into the stack are only in declared values, and none is passed in memory.

use core::fmt;

use super::error;
use super::frame_map::{FrameMap, Place, Register, Source, Verdict};
use super::process;
use super::stack_maps::Registration;

const VERSION: u8 = 3;
const HEADER: usize = 16;
const FUNCTION: usize = 24;
const CONSTANT: usize = 8;
const RECORD: usize = 16;
const LOCATION: usize = 12;
const LIVE_OUT: usize = 4;
const ALIGNMENT: usize = 8;

/// A frame's words are counted before they are stored: locations of 64 KiB would ask for gigabytes.
const MOST_WORDS: usize = u16::MAX as usize;

/// Why a section cannot be read. Offsets are in bytes from the start of the section.
///
/// ```
/// use regrow::map::llvm::{Error, tables};
/// let error = tables(&[2; 16]).next().unwrap().err();
/// assert_eq!(error, Some(Error::Version { offset: 0, found: 2 }));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Error {
    /// The table at `offset` has another version than 3.
    Version {
        /// Where the table begins.
        offset: usize,
        /// The version it claims.
        found: u8,
    },
    /// The section ends before the item at `offset` does. Absurd counts lead to this, too.
    Truncated {
        /// Where it begins.
        offset: usize,
        /// What is cut off.
        what: &'static str,
    },
    /// The functions of a table do not have as many records together as the table.
    Counts {
        /// Where the table begins.
        offset: usize,
        /// The number of records the table's header announces.
        records: u32,
    },
    /// A location's kind is not one of the five.
    Kind {
        /// Where the record of the location begins.
        offset: usize,
        /// The kind it claims.
        found: u8,
    },
    /// A location names a constant that the table does not have.
    Constant {
        /// Where the record of the location begins.
        offset: usize,
        /// The constant it names.
        index: u32,
    },
    /// The maps could not be registered.
    Refused(error::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version { offset, found } => {
                write!(f, ".llvm_stackmaps at {offset:#x}: version {found}, only version {VERSION} is known")
            }
            Self::Truncated { offset, what } => {
                write!(f, ".llvm_stackmaps at {offset:#x}: the section ends within the {what}")
            }
            Self::Counts { offset, records } => {
                write!(f, ".llvm_stackmaps at {offset:#x}: the functions' records do not add up to {records}")
            }
            Self::Kind { offset, found } => {
                write!(f, ".llvm_stackmaps at {offset:#x}: a location of unknown kind {found}")
            }
            Self::Constant { offset, index } => {
                write!(
                    f,
                    ".llvm_stackmaps at {offset:#x}: a location names constant {index}, which there is not"
                )
            }
            Self::Refused(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for Error {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Refused(error) => Some(error),
            _ => None,
        }
    }
}

/// What [`register`] returns.
///
/// ```
/// use regrow::map::{self, Source, Verdict, llvm};
/// # let section = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"));
/// // SAFETY: LLVM wrote the section for the code at the addresses in it.
/// let recorded = unsafe { llvm::register(section, Verdict::Ambiguous)? };
/// for statepoint in &recorded.unusable {
///     eprintln!("{statepoint}");
/// }
/// // A statepoint returns to byte 45 of the code at 0x400000; the call itself ends there.
/// assert_eq!(map::process().read().find(0x40_0000 + 45 - 1).unwrap().source(), Source::Llvm);
/// drop(recorded); // before the code is freed
/// assert!(map::process().read().find(0x40_0000 + 45 - 1).is_none());
/// # Ok::<_, llvm::Error>(())
/// ```
#[must_use = "dropping it removes the maps"]
#[derive(Debug)]
pub struct Recorded {
    /// Dropping it removes the maps.
    pub registration: Registration<'static>,
    /// Statepoints without a map. Their frames are judged by unwind tables alone.
    pub unusable: Vec<Unusable>,
}

/// Adds the maps of all statepoints of a section to those of the process. The addresses in the section have been filled in. Every record
/// with the shape of a statepoint is taken for one; [`Table::frame_maps`] lets you choose.
///
/// `rest` is the verdict for everything that LLVM does not record. Read [above](self#what-llvm-does-not-record) before you say
/// [`Data`](Verdict::Data).
///
/// A JIT has the section in memory. In a program or a shared library no symbol says where it lies, because linkers make symbols only
/// for sections whose names are identifiers of C. Give it such a name in each object file:
///
/// ```text
/// objcopy --rename-section .llvm_stackmaps=llvm_stackmaps,alloc,load,data,contents code.o
/// ```
///
/// (It is `data` because the loader writes the addresses.) Then:
///
/// ```no_run
/// # use regrow::map::{self, Verdict, llvm};
/// unsafe extern "C" {
///     static __start_llvm_stackmaps: u8;
///     static __stop_llvm_stackmaps: u8;
/// }
/// # mod made_by_the_linker {
/// #     #[unsafe(no_mangle)] static __start_llvm_stackmaps: u8 = 0;
/// #     #[unsafe(no_mangle)] static __stop_llvm_stackmaps: u8 = 0;
/// # }
/// let (start, stop) = (&raw const __start_llvm_stackmaps, &raw const __stop_llvm_stackmaps);
/// // SAFETY: the linker puts these around the section, which is not written after the program was loaded.
/// let section = unsafe { std::slice::from_raw_parts(start, stop.addr() - start.addr()) };
/// map::record_loaded_objects();
/// // SAFETY: LLVM wrote the section for code of this program, which stays.
/// let recorded = unsafe { llvm::register(section, Verdict::Ambiguous)? };
/// assert!(recorded.unusable.is_empty(), "{:?}", recorded.unusable);
/// std::mem::forget(recorded); // for as long as the program runs
/// # Ok::<_, llvm::Error>(())
/// ```
///
/// # Safety
///
/// That of [`map::register`](super::register) for all maps of the section:
///
/// - LLVM wrote the section, for the code that lies at the addresses in it.
/// - The words that it records for a statepoint are addresses or not in use. In particular, every record with the shape of a
///   statepoint is one.
/// - `rest` is true of all other words. [`Verdict::Ambiguous`] always is.
/// - The result is dropped before the code is changed or freed, and is leaked only if the code stays until the program ends.
///   It may be dropped earlier: frames of the code are then judged by unwind tables alone.
///
/// Safe code cannot register maps:
///
/// ```compile_fail,E0133
/// let recorded = regrow::map::llvm::register(&[], regrow::map::Verdict::Ambiguous);
/// ```
///
/// # Errors
/// If the section cannot be read, or has maps already. Then nothing is added.
pub unsafe fn register(section: &[u8], rest: Verdict) -> Result<Recorded, Error> {
    let mut maps = Vec::new();
    let mut unusable = Vec::new();
    for table in tables(section) {
        for map in table?.frame_maps(rest, |_| true) {
            match map {
                Ok(map) => maps.push(map),
                Err(one) => unusable.push(one),
            }
        }
    }
    // SAFETY: the section describes the code at the addresses in it, and the code outlives the result: the caller's
    // contract, which is that of `map::register` for the maps made of it.
    let registration = unsafe { process::register(maps) }.map_err(Error::Refused)?;
    Ok(Recorded { registration, unusable })
}

/// Bytes not read yet, and where they begin in the section.
#[derive(Clone, Copy)]
struct Cursor<'a> {
    rest: &'a [u8],
    offset: usize,
}

impl<'a> Cursor<'a> {
    /// The next `count` items of `size` bytes.
    fn take(&mut self, count: u32, size: usize, what: &'static str) -> Result<&'a [u8], Error> {
        let split = (count as usize).checked_mul(size).and_then(|bytes| self.rest.split_at_checked(bytes));
        let (taken, rest) = split.ok_or(Error::Truncated { offset: self.offset, what })?;
        self.rest = rest;
        self.offset += taken.len();
        Ok(taken)
    }

    /// Skips to the next multiple of 8 bytes. Tables begin at one, whatever lies before them.
    fn align(&mut self, what: &'static str) -> Result<(), Error> {
        let padding = self.offset.next_multiple_of(ALIGNMENT) - self.offset;
        self.take(padding as u32, 1, what).map(|_| ())
    }
}

/// The little-endian number of `N` bytes at `at`. Zero outside of `bytes`, which no caller asks for.
fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    if let Some(found) = bytes.get(at..).and_then(|tail| tail.first_chunk::<N>()) {
        number[..N].copy_from_slice(found);
    }
    u64::from_le_bytes(number)
}

/// The tables of a section, one after another. The first error ends the iteration.
///
/// ```
/// // One table: no functions, one constant, no records. Twice, as the linker would join them.
/// let mut section = vec![3, 0, 0, 0,  0, 0, 0, 0,  1, 0, 0, 0,  0, 0, 0, 0,  7, 0, 0, 0, 0, 0, 0, 0];
/// section.extend(section.clone());
/// let constants: Vec<_> = regrow::map::llvm::tables(&section)
///     .map(|table| table.unwrap().constants().collect::<Vec<_>>())
///     .collect();
/// assert_eq!(constants, [[7], [7]]);
/// ```
pub fn tables(section: &[u8]) -> Tables<'_> {
    Tables { cursor: Cursor { rest: section, offset: 0 } }
}

/// The iterator that [`tables`] returns.
///
/// ```
/// use regrow::map::llvm;
/// # let section = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"));
/// # let mut section = section.to_vec();
/// // A table, and then something that is none.
/// section.extend([9; 16]);
/// let mut tables = llvm::tables(&section);
/// assert!(tables.next().is_some_and(|table| table.is_ok()));
/// let error = tables.next().unwrap().err();
/// assert_eq!(error, Some(llvm::Error::Version { offset: section.len() - 16, found: 9 }));
/// assert!(tables.next().is_none());
/// # Ok::<_, llvm::Error>(())
/// ```
#[derive(Clone)]
pub struct Tables<'a> {
    cursor: Cursor<'a>,
}

impl<'a> Iterator for Tables<'a> {
    type Item = Result<Table<'a>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        // No table begins with a zero: its first byte is the version.
        let zeros = self.cursor.rest.iter().take_while(|&&byte| byte == 0).count();
        let padding = match self.cursor.rest.len() {
            all if all == zeros => all,
            _ => zeros - zeros % ALIGNMENT,
        };
        self.cursor.rest = &self.cursor.rest[padding..];
        self.cursor.offset += padding;
        if self.cursor.rest.is_empty() {
            return None;
        }
        let table = Table::read(&mut self.cursor);
        if table.is_err() {
            self.cursor.rest = &[];
        }
        Some(table)
    }
}

/// One table: what one object file contributes.
///
/// ```
/// use regrow::map::llvm;
/// # let section = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"));
/// for table in llvm::tables(section) {
///     let table = table?;
///     assert_eq!(table.functions().len(), 3);
///     assert_eq!(table.constants().len(), 1);
///     assert_eq!(table.records().count(), 3);
/// }
/// # Ok::<_, llvm::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct Table<'a> {
    functions: &'a [u8],
    constants: &'a [u8],
    records: Records<'a>,
}

/// A table has been checked as a whole, so none of this can fail.
///
/// ```
/// use regrow::map::llvm;
/// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
/// let recorded: u64 = table.functions().map(|function| function.records).sum();
/// assert_eq!(recorded, table.records().count() as u64);
/// assert_eq!(table.sites().count(), table.records().count());
/// # Ok::<_, llvm::Error>(())
/// ```
impl<'a> Table<'a> {
    /// Reads the whole table and checks it, so that nothing can fail later.
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, Error> {
        let offset = cursor.offset;
        let header = cursor.take(1, HEADER, "header")?;
        if header[0] != VERSION {
            return Err(Error::Version { offset, found: header[0] });
        }
        let count = |at| number::<4>(header, at) as u32;
        let functions = cursor.take(count(4), FUNCTION, "functions")?;
        let constants = cursor.take(count(8), CONSTANT, "constants")?;
        let records = Records { cursor: *cursor, left: count(12) };
        for _ in 0..records.left {
            Record::read(cursor)?.check(constants.len() / CONSTANT)?;
        }
        let table = Self { functions, constants, records };
        let sum = table.functions().try_fold(0u64, |sum, function| sum.checked_add(function.records));
        match sum == Some(records.left.into()) {
            true => Ok(table),
            false => Err(Error::Counts { offset, records: records.left }),
        }
    }

    /// The functions that have records.
    ///
    /// ```
    /// use regrow::map::llvm;
    /// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
    /// let sizes: Vec<Option<u64>> = table.functions().map(|function| function.stack_size).collect();
    /// assert_eq!(sizes, [Some(56), None, None]);
    /// # Ok::<_, llvm::Error>(())
    /// ```
    pub fn functions(&self) -> impl ExactSizeIterator<Item = Function> + use<'a> {
        self.functions.chunks_exact(FUNCTION).map(|bytes| Function {
            address: number::<8>(bytes, 0),
            stack_size: Some(number::<8>(bytes, 8)).filter(|&size| size != u64::MAX),
            records: number::<8>(bytes, 16),
        })
    }

    /// The constants that are too large for a location.
    ///
    /// ```
    /// use regrow::map::llvm;
    /// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
    /// assert!(table.constants().eq([0x0123_4567_89ab_cdef]));
    /// # Ok::<_, llvm::Error>(())
    /// ```
    pub fn constants(&self) -> impl ExactSizeIterator<Item = u64> + use<'a> {
        self.constants.chunks_exact(CONSTANT).map(|bytes| number::<8>(bytes, 0))
    }

    /// All records, those of the first function first.
    ///
    /// ```
    /// use regrow::map::llvm;
    /// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
    /// assert!(table.records().map(|record| record.id()).eq([7001, 7002, 7003]));
    /// # Ok::<_, llvm::Error>(())
    /// ```
    pub fn records(&self) -> Records<'a> {
        self.records
    }

    /// All records, each with its function.
    ///
    /// ```
    /// use regrow::map::llvm;
    /// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
    /// for (function, record) in table.sites() {
    ///     println!("{:#x}: record {}", function.address + u64::from(record.offset()), record.id());
    /// }
    /// # let addresses = table.sites().map(|(function, record)| function.address + u64::from(record.offset()));
    /// # assert!(addresses.eq([0x40_002d, 0x40_00a3, 0x40_0112]));
    /// # Ok::<_, llvm::Error>(())
    /// ```
    pub fn sites(&self) -> impl Iterator<Item = (Function, Record<'a>)> + use<'a> {
        self.functions().flat_map(|function| (0..function.records).map(move |_| function)).zip(self.records())
    }

    /// The maps of the table's statepoints, in the order of the records. It skips records whose id `is_statepoint` refuses, and records of
    /// another shape.
    ///
    /// `rest` is the verdict for everything that LLVM does not record. Read [above](self#what-llvm-does-not-record) before you say
    /// [`Data`](Verdict::Data). A record that no frame can obey gives an [`Unusable`]. Its frame is judged by unwind tables.
    ///
    /// ```
    /// use regrow::map::{self, Verdict, llvm};
    /// # let section: &[u8] = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"));
    /// let mut maps = Vec::new();
    /// for table in llvm::tables(section) {
    ///     for map in table?.frame_maps(Verdict::Ambiguous, |id| id >= 7000) {
    ///         maps.push(map?);
    ///     }
    /// }
    /// // SAFETY: the section is that of code which is nowhere loaded, so no frame is at these addresses.
    /// let registration = unsafe { map::register(maps)? };
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn frame_maps(
        &self,
        rest: Verdict,
        is_statepoint: impl Fn(u64) -> bool,
    ) -> impl Iterator<Item = Result<FrameMap, Unusable>> {
        self.sites().filter(move |(_, record)| is_statepoint(record.id())).filter_map(
            move |(function, record)| {
                let statepoint = record.statepoint()?;
                let return_address = function.address.wrapping_add(record.offset().into());
                let map = FrameMap::at_return(return_address as usize).rest(rest).registers(rest);
                let described = statepoint.describe(map.source(Source::Llvm));
                Some(described.map_err(|reason| Unusable { return_address, reason }))
            },
        )
    }
}

/// A function with records.
///
/// ```
/// use regrow::map::llvm::{self, Function};
/// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
/// let function: Function = table.functions().next().unwrap();
/// assert_eq!(function, Function { address: 0x40_0000, stack_size: Some(56), records: 1 });
/// # Ok::<_, llvm::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Function {
    /// Its address, or the content of the field if the relocation was not applied yet.
    pub address: u64,
    /// The size of its frames in bytes, without the return address. `None` if it is dynamic.
    pub stack_size: Option<u64>,
    /// How many records it has.
    pub records: u64,
}

/// The records of a [`Table`].
///
/// ```
/// use regrow::map::llvm;
/// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
/// let mut records = table.records();
/// assert!(records.any(|record| record.id() == 7002));
/// assert_eq!(records.count(), 1); // after that one
/// # Ok::<_, llvm::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct Records<'a> {
    cursor: Cursor<'a>,
    left: u32,
}

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    fn next(&mut self) -> Option<Record<'a>> {
        self.left = self.left.checked_sub(1)?;
        Record::read(&mut self.cursor).ok()
    }
}

/// What was recorded at one place in the code.
///
/// ```
/// use regrow::map::llvm;
/// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
/// let record = table.records().next().unwrap();
/// assert_eq!((record.id(), record.offset()), (7001, 45));
/// assert_eq!(record.locations().len(), 17);
/// assert_eq!(record.live_outs().len(), 0);
/// assert!(record.statepoint().is_some());
/// # Ok::<_, llvm::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct Record<'a> {
    start: usize,
    head: &'a [u8],
    locations: &'a [u8],
    live_outs: &'a [u8],
}

/// It does not say which intrinsic it comes from.
///
/// ```
/// use regrow::map::llvm;
/// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/patchpoint.bin"))).next().unwrap()?;
/// // A stackmap, a patchpoint, and a stackmap whose values look like the beginning of a statepoint.
/// let taken_for_a_statepoint = table.records().map(|record| record.statepoint().is_some());
/// assert!(taken_for_a_statepoint.eq([false, false, true]));
/// # Ok::<_, llvm::Error>(())
/// ```
impl<'a> Record<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, Error> {
        let start = cursor.offset;
        let head = cursor.take(1, RECORD, "record")?;
        let locations = cursor.take(number::<2>(head, 14) as u32, LOCATION, "locations")?;
        cursor.align("padding after locations")?;
        let counts = cursor.take(1, 4, "number of live-outs")?;
        let live_outs = cursor.take(number::<2>(counts, 2) as u32, LIVE_OUT, "live-outs")?;
        cursor.align("padding after live-outs")?;
        Ok(Self { start, head, locations, live_outs })
    }

    fn check(&self, constants: usize) -> Result<(), Error> {
        for bytes in self.locations.chunks_exact(LOCATION) {
            match Kind::from_byte(bytes[0]) {
                None => return Err(Error::Kind { offset: self.start, found: bytes[0] }),
                Some(Kind::ConstantIndex) if number::<4>(bytes, 8) >= constants as u64 => {
                    return Err(Error::Constant { offset: self.start, index: number::<4>(bytes, 8) as u32 });
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// The id given to the intrinsic.
    ///
    /// ```
    /// use regrow::map::llvm;
    /// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
    /// // A front end that gives its statepoints the ids from 7000 on.
    /// assert!(table.records().all(|record| record.id() >= 7000));
    /// # Ok::<_, llvm::Error>(())
    /// ```
    pub fn id(&self) -> u64 {
        number::<8>(self.head, 0)
    }

    /// Bytes from the function's address to the place in its code.
    ///
    /// ```
    /// use regrow::map::llvm;
    /// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
    /// let (function, record) = table.sites().next().unwrap();
    /// let return_address = function.address + u64::from(record.offset());
    /// assert_eq!(return_address, 0x40_002d);
    /// # Ok::<_, llvm::Error>(())
    /// ```
    pub fn offset(&self) -> u32 {
        number::<4>(self.head, 8) as u32
    }

    /// Where the recorded values are.
    ///
    /// ```
    /// use regrow::map::llvm::{self, Kind};
    /// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
    /// let record = table.records().next().unwrap();
    /// let in_memory = record.locations().filter(|location| location.kind == Kind::Indirect);
    /// assert_eq!(in_memory.count(), 8);
    /// # Ok::<_, llvm::Error>(())
    /// ```
    pub fn locations(&self) -> Locations<'a> {
        Locations { bytes: self.locations }
    }

    /// The registers that are live after the place. Only patchpoints have them.
    ///
    /// ```
    /// use regrow::map::{Register, llvm};
    /// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/patchpoint.bin"))).next().unwrap()?;
    /// let patchpoint = table.records().find(|record| record.id() == 12).unwrap();
    /// let registers = patchpoint.live_outs().map(|live_out| Register::from_dwarf(live_out.register));
    /// assert!(registers.eq([Some(Register::RAX), Some(Register::RSP)]));
    /// # Ok::<_, llvm::Error>(())
    /// ```
    pub fn live_outs(&self) -> impl ExactSizeIterator<Item = LiveOut> + use<'a> {
        self.live_outs.chunks_exact(LIVE_OUT).map(|bytes| LiveOut {
            register: number::<2>(bytes, 0) as u16,
            size: number::<1>(bytes, 3) as u8,
        })
    }

    /// The record as a statepoint's, if it has this shape:
    ///
    /// ```text
    ///   constant     calling convention
    ///   constant     flags, 0 to 3
    ///   constant     D
    ///   D locations  deopt values
    ///   pairs        base, derived
    ///   Directs      allocas
    /// ```
    ///
    /// ```
    /// use regrow::map::llvm;
    /// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
    /// let statepoint = table.records().next().and_then(|record| record.statepoint()).unwrap();
    /// assert_eq!(statepoint.deopts().len(), 5);
    /// assert_eq!(statepoint.pairs().count(), 4);
    /// assert_eq!(statepoint.allocas().len(), 1);
    /// # Ok::<_, llvm::Error>(())
    /// ```
    pub fn statepoint(&self) -> Option<Statepoint<'a>> {
        let mut all = self.locations();
        let constant = |location: Location| (location.kind == Kind::Constant).then_some(location.value);
        let (_convention, flags, deopts) =
            (constant(all.next()?)?, constant(all.next()?)?, constant(all.next()?)?);
        let (deopts, live) =
            all.bytes.split_at_checked(usize::try_from(deopts).ok()?.checked_mul(LOCATION)?)?;
        let live = Locations { bytes: live };
        // A pair never holds a Direct: LLVM sorts allocas out before it makes pairs.
        let directs = live.clone().rev().take_while(|location| location.kind == Kind::Direct).count();
        let (pairs, allocas) = live.bytes.split_at(live.bytes.len() - directs * LOCATION);
        let shape =
            (0..=3).contains(&flags) && pairs.len() % (2 * LOCATION) == 0 && self.live_outs.is_empty();
        shape.then_some(Statepoint {
            deopts: Locations { bytes: deopts },
            pairs: Locations { bytes: pairs },
            allocas: Locations { bytes: allocas },
        })
    }
}

/// How a [`Location`] holds its value.
///
/// ```
/// use regrow::map::llvm::{self, Kind};
/// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
/// let record = table.records().next().unwrap();
/// let of_kind = |kind| record.locations().filter(|location| location.kind == kind).count();
/// assert_eq!(of_kind(Kind::Indirect), 8); // pointers, and values in memory
/// assert_eq!(of_kind(Kind::Direct), 2); // an alloca, listed twice
/// assert_eq!(of_kind(Kind::Constant) + of_kind(Kind::ConstantIndex), 7);
/// # Ok::<_, llvm::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// In a register.
    Register = 1,
    /// The value is register + offset: the address of an `alloca`.
    Direct = 2,
    /// In memory, at register + offset.
    Indirect = 3,
    /// The value is the location's own number.
    Constant = 4,
    /// The value is one of the table's constants; the location's number is the index.
    ConstantIndex = 5,
}

/// The numbers are those of the section.
///
/// ```
/// use regrow::map::llvm::Kind;
/// assert_eq!(Kind::Indirect as u8, 3);
/// ```
impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Register, Self::Direct, Self::Indirect, Self::Constant, Self::ConstantIndex]
            .into_iter()
            .find(|&kind| kind as u8 == byte)
    }
}

/// Where one recorded value is.
///
/// ```
/// use regrow::map::llvm::{self, Kind, Location};
/// use regrow::map::Register;
/// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
/// // The word at rsp + 48; 7 is DWARF's number of rsp.
/// let word = Location { kind: Kind::Indirect, size: 8, register: 7, value: 48 };
/// let record = table.records().next().unwrap();
/// assert_eq!(record.locations().nth(4), Some(word));
/// assert_eq!(Register::from_dwarf(word.register), Some(Register::RSP));
/// # Ok::<_, llvm::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Location {
    /// How the value is held.
    pub kind: Kind,
    /// The size of the value in bytes. For a `Direct` it is the size of an address, not of the `alloca`.
    pub size: u16,
    /// The DWARF number of the register; 0 in constants.
    pub register: u16,
    /// The offset from the register in bytes (`Direct`, `Indirect`), the sign-extended constant (`Constant`), or the index
    /// (`ConstantIndex`). The index is not negative in a table with fewer than 2³¹ constants.
    pub value: i32,
}

/// The locations of a [`Record`].
///
/// ```
/// use regrow::map::llvm::{self, Kind};
/// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
/// let mut locations = table.records().next().unwrap().locations();
/// assert_eq!(locations.next().unwrap().kind, Kind::Constant); // the calling convention
/// assert_eq!(locations.next_back().unwrap().kind, Kind::Direct); // the alloca
/// assert_eq!(locations.len(), 15);
/// # Ok::<_, llvm::Error>(())
/// ```
#[derive(Clone)]
pub struct Locations<'a> {
    bytes: &'a [u8],
}

/// Counting them does not read them.
///
/// ```
/// use regrow::map::llvm;
/// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
/// let counts = table.records().map(|record| record.locations().len());
/// assert!(counts.eq([17, 5, 5]));
/// # Ok::<_, llvm::Error>(())
/// ```
impl Locations<'_> {
    fn decode(bytes: &[u8; LOCATION]) -> Option<Location> {
        Some(Location {
            kind: Kind::from_byte(bytes[0])?,
            size: number::<2>(bytes, 2) as u16,
            register: number::<2>(bytes, 4) as u16,
            value: number::<4>(bytes, 8) as u32 as i32,
        })
    }
}

impl Iterator for Locations<'_> {
    type Item = Location;

    fn next(&mut self) -> Option<Location> {
        let (first, rest) = self.bytes.split_first_chunk()?;
        self.bytes = rest;
        Self::decode(first)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.bytes.len() / LOCATION, Some(self.bytes.len() / LOCATION))
    }
}

impl DoubleEndedIterator for Locations<'_> {
    fn next_back(&mut self) -> Option<Location> {
        let (rest, last) = self.bytes.split_last_chunk()?;
        self.bytes = rest;
        Self::decode(last)
    }
}

impl ExactSizeIterator for Locations<'_> {}

/// A register that is live after a patchpoint.
///
/// ```
/// use regrow::map::llvm::{self, LiveOut};
/// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/patchpoint.bin"))).next().unwrap()?;
/// let patchpoint = table.records().find(|record| record.id() == 12).unwrap();
/// // All of rax and all of rsp.
/// let live = [LiveOut { register: 0, size: 8 }, LiveOut { register: 7, size: 8 }];
/// assert!(patchpoint.live_outs().eq(live));
/// # Ok::<_, llvm::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LiveOut {
    /// Its DWARF number.
    pub register: u16,
    /// How many bytes of it are live.
    pub size: u8,
}

/// A [`Record`] read as a statepoint's.
///
/// ```
/// use regrow::map::llvm::{self, Kind, Location};
/// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
/// // How many words hold pointers, across each call?
/// for record in table.records() {
///     let Some(statepoint) = record.statepoint() else { continue };
///     let in_memory = |location: &Location| location.kind == Kind::Indirect;
///     let mut words: Vec<i32> = statepoint
///         .pairs()
///         .flat_map(|(base, derived)| [base, derived])
///         .filter(in_memory)
///         .map(|location| location.value)
///         .collect();
///     words.sort();
///     words.dedup();
/// #   let expected: &[i32] = match record.id() { 7001 => &[24, 32, 40], 7002 => &[-24], _ => &[56] };
/// #   assert_eq!(words, expected);
///     println!("{}: {}", record.id(), words.len());
/// }
/// # Ok::<_, llvm::Error>(())
/// ```
#[derive(Clone)]
pub struct Statepoint<'a> {
    deopts: Locations<'a>,
    pairs: Locations<'a>,
    allocas: Locations<'a>,
}

/// ```
/// use regrow::map::llvm;
/// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
/// let record = table.records().next().unwrap();
/// let statepoint = record.statepoint().unwrap();
/// // With the three constants in front, that is all of the record.
/// let locations = 3 + statepoint.deopts().len() + 2 * statepoint.pairs().count() + statepoint.allocas().len();
/// assert_eq!(locations, record.locations().len());
/// # Ok::<_, llvm::Error>(())
/// ```
impl<'a> Statepoint<'a> {
    /// The deopt values, of any type.
    ///
    /// ```
    /// use regrow::map::llvm::{self, Kind};
    /// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
    /// let statepoint = table.records().next().and_then(|record| record.statepoint()).unwrap();
    /// let kinds = statepoint.deopts().map(|location| location.kind);
    /// assert!(kinds.eq([Kind::Constant, Kind::Indirect, Kind::Indirect, Kind::Direct, Kind::ConstantIndex]));
    /// # Ok::<_, llvm::Error>(())
    /// ```
    pub fn deopts(&self) -> Locations<'a> {
        self.deopts.clone()
    }

    /// Base and derived pointer of each pointer that is live across the call. A pair may occur twice.
    ///
    /// ```
    /// use regrow::map::llvm;
    /// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
    /// let statepoint = table.records().next().and_then(|record| record.statepoint()).unwrap();
    /// let (base, derived) = statepoint.pairs().find(|(base, derived)| base != derived).unwrap();
    /// assert_eq!((base.value, derived.value), (24, 40)); // at rsp + 24 and rsp + 40
    /// # Ok::<_, llvm::Error>(())
    /// ```
    pub fn pairs(&self) -> impl Iterator<Item = (Location, Location)> + use<'a> {
        let mut pairs = self.pairs.clone();
        core::iter::from_fn(move || Some((pairs.next()?, pairs.next()?)))
    }

    /// The addresses of the `alloca`s that were listed as live.
    ///
    /// ```
    /// use regrow::map::llvm::{self, Kind};
    /// # let table = llvm::tables(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"))).next().unwrap()?;
    /// let statepoint = table.records().next().and_then(|record| record.statepoint()).unwrap();
    /// let alloca = statepoint.allocas().next().unwrap();
    /// assert_eq!((alloca.kind, alloca.value), (Kind::Direct, 8)); // its address is rsp + 8
    /// # Ok::<_, llvm::Error>(())
    /// ```
    pub fn allocas(&self) -> Locations<'a> {
        self.allocas.clone()
    }

    /// Adds to `map` what the statepoint says about its frame.
    fn describe(&self, mut map: FrameMap) -> Result<FrameMap, Reason> {
        for location in self.deopts() {
            map = match (location.kind, callee_saved(location), Words::of(location)) {
                (Kind::Indirect, _, Ok(words)) => words.add(map, Verdict::Ambiguous)?,
                (Kind::Register, Ok(register), _) => map.register(register, Verdict::Ambiguous),
                _ => map, // an address, a constant, or too small for a pointer
            };
        }
        for location in self.pairs.clone().chain(self.allocas()) {
            map = match location.kind {
                Kind::Constant | Kind::ConstantIndex => map,
                Kind::Register => map.register(callee_saved(location)?, Verdict::Pointer),
                Kind::Direct | Kind::Indirect => Words::of(location)?.add(map, Verdict::Pointer)?,
            };
        }
        Ok(map)
    }
}

/// The register of a location, if its value survives a call there.
fn callee_saved(location: Location) -> Result<Register, Reason> {
    let register = Register::from_dwarf(location.register);
    let kept = register.filter(|register| register.saved_index().is_some() && location.size == 8);
    kept.ok_or(Reason::Register(location.register))
}

/// The registers that LLVM counts the words of a frame from.
const BASES: [Register; 3] = [Register::RSP, Register::RBP, Register::RBX];

/// A location that is made of whole words of the frame.
struct Words {
    base: Register,
    offsets: core::ops::Range<i32>,
}

impl Words {
    fn of(location: Location) -> Result<Self, Reason> {
        let Location { size, register, value: start, .. } = location;
        let base = Register::from_dwarf(register).filter(|base| BASES.contains(base));
        let base = base.ok_or(Reason::Base(register))?;
        let whole = size > 0 && size % 8 == 0 && start % 8 == 0;
        let end = start.checked_add(size.into()).filter(|&end| {
            whole
                && [start, end].into_iter().all(|offset| Place::checked(Some(base), offset.into()).is_some())
        });
        Ok(Self { base, offsets: start..end.ok_or(Reason::Place { offset: start, size })? })
    }

    fn add(self, mut map: FrameMap, verdict: Verdict) -> Result<FrameMap, Reason> {
        if map.words().len() + self.offsets.len() / 8 > MOST_WORDS {
            return Err(Reason::Words);
        }
        for offset in self.offsets.step_by(8) {
            map = map.word(Place::at(self.base, offset), verdict);
        }
        // A base other than the stack pointer is itself a pointer, kept in a register across the call.
        Ok(if self.base == Register::RSP { map } else { map.register(self.base, Verdict::Pointer) })
    }
}

/// A statepoint that no frame can obey.
///
/// ```
/// use regrow::map::Verdict;
/// use regrow::map::llvm::{self, Reason, Unusable};
/// # let mut section = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint-registers.bin")).to_vec();
/// # section[236] = 0; // of rbx
/// // A statepoint with a pointer in rax, which the callee may overwrite.
/// // SAFETY: the section is that of code which is nowhere loaded, so no frame is at these addresses.
/// let recorded = unsafe { llvm::register(&section, Verdict::Ambiguous)? };
/// let unusable = Unusable { return_address: 0x40_0029, reason: Reason::Register(0) };
/// assert_eq!(recorded.unusable, [unusable]);
/// println!("judged by its value: {unusable}");
/// # Ok::<_, llvm::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unusable {
    /// Where the statepoint's call returns to.
    pub return_address: u64,
    /// Why.
    pub reason: Reason,
}

/// Why a statepoint is [`Unusable`].
///
/// ```
/// use regrow::map::Verdict;
/// use regrow::map::llvm::{self, Reason};
/// # let section = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llvm/statepoint.bin"));
/// # let mut section = section.to_vec();
/// # section[240] = 28; // of 24
/// // A statepoint with a pointer at rsp + 28.
/// let table = llvm::tables(&section).next().unwrap()?;
/// let unusable = table.frame_maps(Verdict::Ambiguous, |_| true).find_map(Result::err).unwrap();
/// assert_eq!(unusable.reason, Reason::Place { offset: 28, size: 8 });
/// # Ok::<_, llvm::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Reason {
    /// A pointer is in a register that does not survive the call or has no 8 bytes. This is its DWARF number.
    Register(u16),
    /// A pointer lies at an offset from a register that cannot be a base. This is its DWARF number.
    Base(u16),
    /// A pointer does not consist of whole, aligned words within 64 MiB of the base.
    Place {
        /// Bytes from the base.
        offset: i32,
        /// Bytes.
        size: u16,
    },
    /// The pointers take more than 65,535 words.
    Words,
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the statepoint that returns to {:#x} has ", self.return_address)?;
        match self.reason {
            Reason::Register(register) => {
                write!(f, "a pointer in register {register} (DWARF), which no call saves")
            }
            Reason::Base(register) => {
                write!(f, "a pointer relative to register {register} (DWARF), which is no base")
            }
            Reason::Place { offset, size } => {
                write!(f, "a pointer of {size} bytes at offset {offset}: not whole words, or too far")
            }
            Reason::Words => write!(f, "more than {MOST_WORDS} words"),
        }
    }
}

impl core::error::Error for Unusable {}
