//! Recording `.eh_frame`: the unwind tables that compilers write for every function, of every loaded object.
//!
//! ```text
//!   dl_iterate_phdr ─► PT_GNU_EH_FRAME ─► .eh_frame_hdr: | first byte of .eh_frame | a sorted table: function, FDE |
//!                                                                │
//!                      .eh_frame: CIE, FDE, FDE, ...  each FDE: a range of code, and a little program ─► rows
//! ```
//!
//! The tables are read where the loader has mapped them; no file is opened. `gimli` parses them and runs the programs. Each row becomes
//! a [`FrameMap`]. A row that [`Rules`] cannot express is kept, with the reason.

use core::fmt;
use core::ops::{ControlFlow, Range};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use gimli::{
    BaseAddresses, CfaRule, CieOrFde, CommonInformationEntry, EhFrame, EhFrameHdr, EndianSlice,
    FrameDescriptionEntry, LittleEndian, Operation, RegisterRule, UnwindContext, UnwindExpression,
    UnwindSection, UnwindTableRow,
};

use super::assembly;
use super::error::Error;
use super::frame_map::{Cfa, FrameMap, Kind, Place, Register, Rules, Source, Unwalkable, Verdict};
use super::objects::{self, LoadedObject};
use super::process::PROCESS;
use super::stack_maps::{LayerName, Registration, StackMaps};

type Bytes<'a> = EndianSlice<'a, LittleEndian>;
type Section<'a> = EhFrame<Bytes<'a>>;
type Fde<'a> = FrameDescriptionEntry<Bytes<'a>>;

const RIP: gimli::Register = gimli::Register(16);
const RSP: gimli::Register = gimli::Register(7);
const WORD: u8 = size_of::<usize>() as u8;

unsafe extern "C" {
    /// A coroutine's first frame (asm/switch.S).
    fn regrow_entry();
}

/// What was recorded of one object; part of a [`Report`].
///
/// ```
/// use regrow::map::ObjectReport;
/// let report = regrow::map::record_loaded_objects();
/// let program: &ObjectReport = report.added.iter().find(|object| object.name.is_empty()).unwrap();
/// assert!(program.functions > 0 && program.error.is_none());
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ObjectReport {
    /// Its path as the loader knows it; empty for the program itself.
    pub name: String,
    /// Where it is loaded.
    pub address: usize,
    /// Functions with unwind tables.
    pub functions: usize,
    /// Rows of the table that was made of them.
    pub rows: usize,
    /// The size of that table in bytes.
    pub bytes: usize,
    /// How long it took.
    pub time: Duration,
    /// Code whose frames cannot be walked, and why.
    pub unwalkable: Vec<(Range<usize>, Unwalkable)>,
    /// What is wrong with its tables, if they could not be read to their end.
    pub error: Option<String>,
}

impl ObjectReport {
    fn new(name: String, address: usize) -> Self {
        Self {
            name,
            address,
            functions: 0,
            rows: 0,
            bytes: 0,
            time: Duration::ZERO,
            unwalkable: Vec::new(),
            error: None,
        }
    }

    /// Adds the object's maps, and notes here what they take.
    fn add(
        &mut self,
        to: &'static StackMaps,
        layer: LayerName,
        maps: Vec<FrameMap>,
    ) -> Option<Registration<'static>> {
        let start = Instant::now();
        let added = to.add(layer, maps);
        self.time += start.elapsed();
        match added {
            Ok((registration, size)) => {
                self.rows = size.rows;
                self.bytes = size.bytes;
                Some(registration)
            }
            Err(error) => {
                self.error = Some(error.to_string());
                None
            }
        }
    }
}

/// What [`record_loaded_objects`] did. Printed, it is a table.
///
/// ```
/// let report = regrow::map::record_loaded_objects();
/// assert!(report.bytes() < report.rows() * 16 + 4096);
/// for object in report.added {
///     for (code, why) in object.unwalkable {
///         println!("{} {code:x?}: {why}", object.name);
///     }
/// }
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// The objects that this call recorded.
    pub added: Vec<ObjectReport>,
    /// How many objects were removed, because they are no longer loaded.
    pub removed: usize,
}

impl Report {
    /// The rows of all objects.
    ///
    /// ```
    /// let report = regrow::map::record_loaded_objects();
    /// assert!(report.rows() > report.added[0].rows); // there are libraries, too
    /// ```
    #[must_use]
    pub fn rows(&self) -> usize {
        self.added.iter().map(|object| object.rows).sum()
    }

    /// The size of all tables in bytes.
    ///
    /// ```
    /// let report = regrow::map::record_loaded_objects();
    /// println!("{:.1} MB for the frames of the program and its libraries", report.bytes() as f64 / 1e6);
    /// # assert!(report.bytes() > 0);
    /// ```
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.added.iter().map(|object| object.bytes).sum()
    }

    /// How long it took.
    ///
    /// ```
    /// let report = regrow::map::record_loaded_objects();
    /// assert!(report.added.iter().all(|object| object.time <= report.time()));
    /// ```
    #[must_use]
    pub fn time(&self) -> Duration {
        self.added.iter().map(|object| object.time).sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "functions     rows  bytes/row        ms  unwalkable  object")?;
        let mut line = |functions, rows: usize, bytes: usize, time: Duration, unwalkable, name: &str| {
            let each = bytes as f64 / rows.max(1) as f64;
            let milliseconds = time.as_secs_f64() * 1e3;
            writeln!(f, "{functions:9} {rows:8} {each:10.1} {milliseconds:9.2} {unwalkable:11}  {name}")
        };
        let mut functions = 0;
        let mut unwalkable = 0;
        for object in &self.added {
            let name = object.name.rsplit('/').next().unwrap_or_default();
            let name = if name.is_empty() { "(program)" } else { name };
            let count = object.unwalkable.len();
            line(object.functions, object.rows, object.bytes, object.time, count, name)?;
            functions += object.functions;
            unwalkable += count;
        }
        line(functions, self.rows(), self.bytes(), self.time(), unwalkable, "in all")?;
        for object in &self.added {
            if let Some(error) = &object.error {
                writeln!(f, "{}: {error}", object.name)?;
            }
        }
        Ok(())
    }
}

/// Records the unwind tables of each loaded object that is not recorded yet, and removes those of objects that are no longer loaded.
/// The first call also records the maps of assembly that was written with `asm/frame_map.inc` and linked into the same object as this
/// crate. If nothing was loaded or unloaded since the last call, it returns at once.
///
/// Call it after `dlopen` if coroutines that run code of that object may be moved.
///
/// ```
/// use regrow::map;
/// let report = map::record_loaded_objects();
/// println!("{report}");
/// assert!(map::record_loaded_objects().added.is_empty()); // unless another thread loads objects
/// ```
pub fn record_loaded_objects() -> Report {
    static RECORDED: Mutex<Recorded> =
        Mutex::new(Recorded { changes: (0, 0), objects: Vec::new(), assembly: None });
    RECORDED.lock().unwrap_or_else(PoisonError::into_inner).refresh(&PROCESS)
}

/// Adds the unwind tables of code that was compiled at run time: the contents of its `.eh_frame` section, at the address that it
/// was relocated for. Dropping the result removes them.
///
/// # Safety
///
/// Stacks are walked and moved by these tables. So:
///
/// - The section is a complete `.eh_frame` section, at the address that it was relocated for. It is only read during the call.
/// - What it says of the code is true: at each address of a function it finds the frame's caller.
/// - The result is dropped before the code is changed or freed, and is leaked only if the code stays until the program ends. It may be
///   dropped earlier: a stack with a frame of the code on it then stays where it is.
///
/// Safe code cannot register tables:
///
/// ```compile_fail,E0133
/// let registration = regrow::map::register_eh_frame(&[0; 4]);
/// ```
///
/// # Errors
/// If a function is in other tables already, or is larger than 2 GiB. What cannot be parsed is left out.
///
/// ```
/// # fn code_and_tables() -> (Vec<u8>, Vec<u8>) { (vec![0xc3], vec![0; 4]) }
/// let (code, eh_frame) = code_and_tables();
/// // SAFETY: the compiler made the tables for this code; they are removed before it is freed.
/// let registration = unsafe { regrow::map::register_eh_frame(&eh_frame)? };
/// // ... run it ... and when it is freed:
/// drop(registration);
/// # Ok::<(), regrow::map::Error>(())
/// ```
pub unsafe fn register_eh_frame(section: &[u8]) -> Result<Registration<'static>, Error> {
    let tables = Tables::new(section, section.as_ptr() as usize, None);
    let mut functions = Functions::default();
    let _ = tables.each_in_order_of_section(|fde| functions.push(&tables, fde));
    PROCESS.add(LayerName::Unwind, functions.maps).map(|(registration, _)| registration)
}

/// The objects that are in the table of the process.
struct Recorded {
    /// How many objects had been loaded and unloaded.
    changes: (u64, u64),
    objects: Vec<(ObjectKey, Option<Registration<'static>>)>,
    /// What assembly brought; never removed.
    assembly: Option<Option<Registration<'static>>>,
}

/// Tells an object from others that may be loaded at the same address later.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct ObjectKey {
    header: usize,
    hash: u64,
}

impl Recorded {
    fn refresh(&mut self, maps: &'static StackMaps) -> Report {
        let mut visit = Visit { recorded: self, found: Vec::new(), new: Vec::new(), changes: None };
        objects::visit(|object| visit.look_at(object));
        let Visit { found, new, changes, .. } = visit;
        let mut report = Report::default();
        if changes.is_none_or(|changes| changes == self.changes) {
            return report;
        }
        self.changes = changes.unwrap_or_default();
        let before = self.objects.len();
        self.objects.retain(|(key, _)| found.contains(key));
        report.removed = before - self.objects.len();
        for (key, mut object, functions) in new {
            self.objects.push((key, object.add(maps, LayerName::Unwind, functions.maps)));
            report.added.push(object);
        }
        if self.assembly.is_none() {
            let section = assembly::section();
            let parsed = assembly::parse(section, section.as_ptr() as usize);
            let mut object = ObjectReport::new("(assembly)".to_owned(), section.as_ptr() as usize);
            object.error = parsed.as_ref().err().map(|error| format!("malformed at byte {}", error.offset));
            let parsed = parsed.unwrap_or_default();
            object.functions = parsed.len();
            self.assembly = Some(object.add(maps, LayerName::Registered, parsed));
            if !section.is_empty() {
                report.added.push(object);
            }
        }
        report
    }
}

/// What a visit to all objects collects.
struct Visit<'a> {
    recorded: &'a Recorded,
    /// All objects there are.
    found: Vec<ObjectKey>,
    new: Vec<(ObjectKey, ObjectReport, Functions)>,
    changes: Option<(u64, u64)>,
}

impl Visit<'_> {
    fn look_at(&mut self, object: &LoadedObject<'_>) -> ControlFlow<()> {
        let changes = object.changes();
        self.changes = Some(changes);
        if changes == self.recorded.changes {
            return ControlFlow::Break(()); // enough: nothing has changed
        }
        if let Some(object) = Object::new(object) {
            let key = object.key();
            self.found.push(key);
            if !self.recorded.objects.iter().any(|(known, _)| *known == key) {
                let (report, functions) = object.record();
                self.new.push((key, report, functions));
            }
        }
        ControlFlow::Continue(())
    }
}

/// A loaded object with unwind tables.
struct Object<'a> {
    name: String,
    address: usize,
    header: &'a [u8],
    /// Its segments that are readable and constant.
    segments: Vec<&'a [u8]>,
}

impl<'a> Object<'a> {
    /// `None` if it has no unwind tables.
    fn new(object: &LoadedObject<'a>) -> Option<Self> {
        Some(Self {
            name: object.path().to_string_lossy().into_owned(),
            address: object.address(),
            header: object.unwind_header()?,
            segments: object.constants().collect(),
        })
    }

    fn key(&self) -> ObjectKey {
        let mut hasher = DefaultHasher::new();
        hasher.write(self.header);
        ObjectKey { header: self.header.as_ptr() as usize, hash: hasher.finish() }
    }

    /// The bytes from `address` to the end of its segment.
    fn from(&self, address: usize) -> Option<&'a [u8]> {
        self.segments
            .iter()
            .find_map(|segment| segment.get(address.checked_sub(segment.as_ptr() as usize)?..))
    }

    fn record(self) -> (ObjectReport, Functions) {
        let start = Instant::now();
        let mut functions = Functions::default();
        let error = self.read(&mut functions).err().map(|error| error.to_string());
        let report = ObjectReport {
            functions: functions.count,
            time: start.elapsed(),
            unwalkable: core::mem::take(&mut functions.unwalkable),
            error,
            ..ObjectReport::new(self.name, self.address)
        };
        (report, functions)
    }

    fn read(&self, functions: &mut Functions) -> gimli::Result<()> {
        let header_address = self.header.as_ptr() as usize;
        let bases = BaseAddresses::default().set_eh_frame_hdr(header_address as u64);
        let header = EhFrameHdr::new(self.header, LittleEndian).parse(&bases, WORD)?;
        let address = header.eh_frame_ptr().direct()? as usize;
        let section = self.from(address).ok_or(gimli::Error::OffsetOutOfBounds(address as u64))?;
        let tables = Tables::new(section, address, Some(header_address));
        let Some(table) = header.table() else {
            return tables.each_in_order_of_section(|fde| functions.push(&tables, fde));
        };
        let mut cies = HashMap::new();
        let mut entries = table.iter(&tables.bases);
        while let Some((_, entry)) = entries.next()? {
            let entry = entry.direct()?;
            let offset =
                entry.checked_sub(address as u64).ok_or(gimli::Error::OffsetOutOfBounds(entry))? as usize;
            let fde =
                tables.section.fde_from_offset(&tables.bases, offset.into(), |section, bases, offset| {
                    cached(&mut cies, section, bases, offset)
                })?;
            functions.push(&tables, &fde);
        }
        Ok(())
    }
}

type Cies<'a> = HashMap<usize, CommonInformationEntry<Bytes<'a>>>;

/// A CIE, parsed once: thousands of FDEs share a few.
fn cached<'a>(
    cies: &mut Cies<'a>,
    section: &Section<'a>,
    bases: &BaseAddresses,
    offset: gimli::EhFrameOffset,
) -> gimli::Result<CommonInformationEntry<Bytes<'a>>> {
    if let Some(cie) = cies.get(&offset.0) {
        return Ok(cie.clone());
    }
    let cie = section.cie_from_offset(bases, offset)?;
    cies.insert(offset.0, cie.clone());
    Ok(cie)
}

/// An `.eh_frame` section and where it lies.
struct Tables<'a> {
    section: Section<'a>,
    bases: BaseAddresses,
}

impl<'a> Tables<'a> {
    fn new(section: &'a [u8], address: usize, header: Option<usize>) -> Self {
        let bases = BaseAddresses::default().set_eh_frame(address as u64);
        Self {
            section: EhFrame::new(section, LittleEndian),
            bases: match header {
                Some(header) => bases.set_eh_frame_hdr(header as u64),
                None => bases,
            },
        }
    }

    /// Visits all functions, in whatever order they are, up to the section's end or terminator.
    fn each_in_order_of_section(&self, mut visit: impl FnMut(&Fde<'a>)) -> gimli::Result<()> {
        let mut cies = HashMap::new();
        let mut entries = self.section.entries(&self.bases);
        while let Some(entry) = entries.next()? {
            if let CieOrFde::Fde(partial) = entry {
                visit(&partial.parse(|section, bases, offset| cached(&mut cies, section, bases, offset))?);
            }
        }
        Ok(())
    }

    /// `register + offset`, and what is left of the expression.
    fn address(
        &self,
        expression: UnwindExpression<usize>,
        fde: &Fde<'a>,
    ) -> Option<(Register, i32, Vec<Op>)> {
        let mut operations = expression.get(&self.section).ok()?.operations(fde.cie().encoding());
        let Some(Operation::RegisterOffset { register, offset, .. }) = operations.next().ok()? else {
            return None;
        };
        let mut rest = Vec::new();
        while let Some(operation) = operations.next().ok()? {
            rest.push(Op::from(operation)?);
        }
        Some((Register::from_dwarf(register.0)?, offset.try_into().ok()?, rest))
    }

    /// The place of a register that is saved at `register + offset`.
    fn place(&self, expression: UnwindExpression<usize>, fde: &Fde<'a>) -> Option<Place> {
        let (register, offset, rest) = self.address(expression, fde)?;
        if rest.is_empty() { Place::checked(Some(register), offset.into()) } else { None }
    }

    fn cfa_expression(&self, expression: UnwindExpression<usize>, fde: &Fde<'a>) -> Option<Cfa> {
        use Op::{And, Constant, Deref, Ge, Plus, Register as At, Shl};
        let (register, offset, rest) = self.address(expression, fde)?;
        match rest[..] {
            [] => Some(Cfa::Register(register, offset)),
            [Deref] => Some(Cfa::Loaded { register, offset, plus: 0 }),
            [Deref, Plus(plus)] => Some(Cfa::Loaded { register, offset, plus: plus.try_into().ok()? }),
            // rsp + 8 + (((rip & 15) >= pushed) << 3)
            [At(RIP, 0), Constant(15), And, Constant(pushed @ 0..16), Ge, Constant(3), Shl, Op::Add]
                if register == Register::RSP && offset == 8 =>
            {
                Some(Cfa::Plt { pushed: pushed as u8 })
            }
            _ => None,
        }
    }

    fn rules(&self, row: &UnwindTableRow<usize>, fde: &Fde<'a>) -> Result<Rules, Unwalkable> {
        let cfa = match *row.cfa() {
            CfaRule::RegisterAndOffset { register, offset } => Register::from_dwarf(register.0)
                .zip(offset.try_into().ok())
                .map(|(register, offset)| Cfa::Register(register, offset)),
            CfaRule::Expression(expression) => self.cfa_expression(expression, fde),
        };
        let cfa = cfa.ok_or(Unwalkable::CfaExpression)?;
        self.check_stack_pointer(row.register(RSP), cfa, fde)?;
        let mut rules = Rules::new(cfa)
            .return_address(match row.register(fde.cie().return_address_register()) {
                None | Some(RegisterRule::Undefined) => Place::UNDEFINED,
                rule => self
                    .saved(rule, fde)
                    .filter(|place| *place != Place::SAME)
                    .ok_or(Unwalkable::ReturnAddress)?,
            })
            .kind(if fde.is_signal_trampoline() { Kind::Signal } else { Kind::Call });
        for register in Register::CALLEE_SAVED {
            let rule = row.register(gimli::Register(register.dwarf().into()));
            rules = rules.saved(register, self.saved(rule, fde).ok_or(Unwalkable::SavedRegister)?);
        }
        Ok(rules)
    }

    fn saved(&self, rule: Option<RegisterRule<usize>>, fde: &Fde<'a>) -> Option<Place> {
        match rule {
            None | Some(RegisterRule::SameValue) => Some(Place::SAME),
            Some(RegisterRule::Undefined) => Some(Place::UNDEFINED),
            Some(RegisterRule::Offset(offset)) => Place::checked(None, offset),
            Some(RegisterRule::Expression(expression)) => self.place(expression, fde),
            _ => None,
        }
    }

    /// The caller's stack pointer must be the CFA.
    fn check_stack_pointer(
        &self,
        rule: Option<RegisterRule<usize>>,
        cfa: Cfa,
        fde: &Fde<'a>,
    ) -> Result<(), Unwalkable> {
        let is_cfa = match rule {
            None | Some(RegisterRule::ValOffset(0)) => true,
            // Signal frames load it from where they load the CFA from.
            Some(RegisterRule::Expression(expression)) => match (self.place(expression, fde), cfa) {
                (Some(place), Cfa::Loaded { register, offset, plus: 0 }) => {
                    Some(place) == Place::checked(Some(register), offset.into())
                }
                _ => false,
            },
            _ => false,
        };
        if is_cfa { Ok(()) } else { Err(Unwalkable::StackPointer) }
    }
}

/// The operations of the expressions we know.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Op {
    Register(gimli::Register, i64),
    Constant(u64),
    Plus(u64),
    Deref,
    And,
    Ge,
    Shl,
    Add,
}

impl Op {
    fn from(operation: Operation<Bytes<'_>>) -> Option<Self> {
        Some(match operation {
            Operation::RegisterOffset { register, offset, .. } => Self::Register(register, offset),
            Operation::UnsignedConstant { value } => Self::Constant(value),
            Operation::PlusConstant { value } => Self::Plus(value),
            Operation::Deref { size: WORD, space: false, .. } => Self::Deref,
            Operation::And => Self::And,
            Operation::Ge => Self::Ge,
            Operation::Shl => Self::Shl,
            Operation::Plus => Self::Add,
            _ => return None,
        })
    }
}

/// The maps of functions.
struct Functions {
    count: usize,
    maps: Vec<FrameMap>,
    unwalkable: Vec<(Range<usize>, Unwalkable)>,
    context: UnwindContext<usize>,
}

impl Default for Functions {
    fn default() -> Self {
        Self { count: 0, maps: Vec::new(), unwalkable: Vec::new(), context: UnwindContext::new() }
    }
}

impl Functions {
    /// Adds the rows of a function. Where it overlaps one that was added right before, that one holds.
    fn push<'a>(&mut self, tables: &Tables<'a>, fde: &Fde<'a>) {
        let (start, end) = (fde.initial_address() as usize, fde.end_address() as usize);
        if start >= end {
            return;
        }
        self.count += 1;
        let is_base = start == regrow_entry as *const () as usize;
        let mut context = core::mem::take(&mut self.context);
        let mut covered = start;
        if let Ok(mut rows) = fde.rows(&tables.section, &tables.bases, &mut context) {
            while let Ok(Some(row)) = rows.next_row() {
                let row_end = (row.end_address() as usize).clamp(covered, end);
                self.push_row(covered..row_end, tables.rules(row, fde), is_base);
                covered = row_end;
            }
        }
        self.push_row(covered..end, Err(Unwalkable::Malformed), is_base);
        self.context = context;
    }

    fn push_row(&mut self, mut range: Range<usize>, rules: Result<Rules, Unwalkable>, is_base: bool) {
        if let Some(last) = self.maps.last().filter(|last| last.range.start <= range.start) {
            range.start = range.start.max(last.range.end);
        }
        if range.is_empty() {
            return;
        }
        if let Err(reason) = rules {
            self.unwalkable.push((range.clone(), reason));
        }
        let map = FrameMap { rules: Some(rules), ..FrameMap::new(range) }.source(Source::EhFrame);
        self.maps.push(if is_base { base(map) } else { map });
    }
}

/// The map of a coroutine's base: a walk ends there. Its rbp is the base's own address; rbx and the rest are the resumer's.
fn base(map: FrameMap) -> FrameMap {
    let rules = map.rules.map(|rules| rules.map(|rules| rules.kind(Kind::Base)));
    FrameMap { rules, ..map }.register(Register::RBP, Verdict::Pointer).register(Register::RBX, Verdict::Data)
}

#[cfg(test)]
mod tests {
    use core::slice;

    use super::*;
    use proptest::prelude::*;

    /// This program's `.eh_frame`, or as much of it as the loader has mapped behind it.
    fn section() -> &'static [u8] {
        let mut found: &[u8] = &[];
        objects::visit(|object| {
            // The program, which comes first and is never unloaded.
            let header = object.unwind_header().unwrap();
            let bases = BaseAddresses::default().set_eh_frame_hdr(header.as_ptr() as u64);
            let section = EhFrameHdr::new(header, LittleEndian).parse(&bases, WORD).unwrap().eh_frame_ptr();
            let object = Object::new(object).unwrap();
            let section = object.from(section.pointer() as usize).unwrap();
            // SAFETY: the program's constants stay where they are.
            found = unsafe { slice::from_raw_parts(section.as_ptr(), section.len()) };
            ControlFlow::Break(())
        });
        found
    }

    fn record(section: &[u8], address: usize) -> Functions {
        let mut functions = Functions::default();
        let tables = Tables::new(section, address, None);
        let _ = tables.each_in_order_of_section(|fde| functions.push(&tables, fde));
        functions
    }

    proptest! {
        /// Damaged tables are an error, or other maps: never a panic, and never a table that cannot be built or refused.
        #[test]
        fn damaged_tables_are_read_within_bounds(
            begin in any::<prop::sample::Index>(),
            damage in prop::collection::vec((0..2000usize, any::<u8>()), 0..10),
            length in 0..2000usize,
        ) {
            let whole = section();
            // From some entry on: each begins with its length. The first is the CIE, which the others refer back to.
            let mut starts = vec![0];
            while starts.len() < 1000 {
                let at = *starts.last().unwrap();
                let bytes = u32::from_le_bytes(*whole[at..].first_chunk().unwrap());
                if bytes == 0 { break }
                starts.push(at + 4 + bytes as usize);
            }
            let begin = starts[begin.index(starts.len())];
            let mut piece = whole[..begin + length.min(whole.len() - begin)].to_vec();
            for (at, byte) in damage {
                let at = if at % 2 == 0 { at % 60 } else { begin + at };
                if let Some(place) = piece.get_mut(at) {
                    *place = byte;
                }
            }
            let address = whole.as_ptr() as usize;
            let _ = super::super::table::Table::build(record(&piece, address).maps);
        }
    }

    #[test]
    fn the_section_alone_gives_the_same_maps_as_with_its_header() {
        let mut functions = record(section(), section().as_ptr() as usize);
        assert!(functions.count > 1000);
        functions.maps.sort_by_key(|map| map.range.start);
        record_loaded_objects();
        let reader = super::super::process::process().read();
        for map in &functions.maps {
            let found = reader.find(map.range.start).expect("recorded");
            assert_eq!(found.rules(), map.rules, "{map:?}");
        }
    }

    #[test]
    fn a_coroutines_first_frame_is_a_base() {
        record_loaded_objects();
        let reader = super::super::process::process().read();
        let map = reader.find(regrow_entry as *const () as usize + 3).unwrap();
        let rules = map.rules().unwrap().unwrap();
        assert_eq!(rules.kind, Kind::Base);
        // After its first instruction: *rsp + 16.
        assert_eq!(rules.cfa, Cfa::Loaded { register: Register::RSP, offset: 0, plus: 16 });
    }
}
