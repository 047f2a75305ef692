//! All tables of a process. They are replaced as a whole: readers never wait, and writers wait only for each other.
//!
//! ```text
//!   current ─► Snapshot { registered: [segment, segment, ...],  unwind: [segment, ...] }
//!                                       └─ start, length, table     sorted, not overlapping
//! ```
//!
//! `published.rs` explains how a snapshot is replaced while others read. Tables that overlap (assembly and LLVM maps of one program) are
//! merged into one segment, so that a look-up is one search.

use core::fmt;
use core::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::error::Error;
use super::frame_map::{FrameMap, Place, Register, Rules, Source, Unwalkable, Verdict};
use super::published::{Published, Reading, Retired};
use super::table::{Entry, Run, Table};

/// Frame maps by code address. Anyone can read them at any time, even a signal handler, while others add and remove maps.
///
/// Stacks are moved by the maps of [`process`](super::process) only. So registering in another one is safe, whatever the maps say.
///
/// ```
/// use regrow::map::{Cfa, FrameMap, Rules, StackMaps};
/// static MAPS: StackMaps = StackMaps::new();
///
/// let rules = Rules::new(Cfa::rsp(32));
/// let registration = MAPS.register(vec![FrameMap::new(0x1000..0x1040).rules(rules)]).unwrap();
/// assert_eq!(MAPS.read().find(0x103f).unwrap().rules(), Some(Ok(rules)));
/// assert!(MAPS.read().find(0x1040).is_none());
/// drop(registration); // the code is freed
/// assert!(MAPS.read().find(0x1000).is_none());
/// ```
pub struct StackMaps {
    /// What readers see; nothing as long as nothing has been registered.
    current: Published<Snapshot>,
    writer: Mutex<Writer>,
}

/// What readers see at one time.
#[derive(Default)]
struct Snapshot {
    layers: [Layer; 2],
}

/// Which maps hold if there are two: those of the first layer. Rules that they do not give come from the second.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub(super) enum LayerName {
    Registered = 0,
    Unwind = 1,
}

/// Segments in order of their addresses; they do not overlap.
type Layer = Box<[Segment]>;

#[derive(Clone)]
pub(super) struct Segment {
    start: usize,
    length: usize,
    table: Arc<Table>,
    /// The registrations it was merged from, if it was.
    merged: Option<Box<[u64]>>,
}

/// What writers share.
struct Writer {
    last_number: u64,
    /// In order of their addresses, by layer.
    tables: [Vec<Numbered>; 2],
    /// Snapshots that were replaced.
    retired: Vec<Retired<Snapshot>>,
}

/// A table and the registration that brought it.
#[derive(Clone)]
struct Numbered {
    number: u64,
    table: Arc<Table>,
}

// SAFETY: the pointers are to snapshots that this owns; what is in them may be shared and sent.
unsafe impl Send for Writer {}

impl Default for StackMaps {
    fn default() -> Self {
        Self::new()
    }
}

impl StackMaps {
    /// No maps yet.
    ///
    /// ```
    /// use regrow::map::StackMaps;
    /// static MAPS: StackMaps = StackMaps::new();
    /// assert!(MAPS.read().find(0x1000).is_none());
    /// ```
    #[must_use]
    pub const fn new() -> Self {
        Self {
            current: Published::new(),
            writer: Mutex::new(Writer {
                last_number: 0,
                tables: [const { Vec::new() }; 2],
                retired: Vec::new(),
            }),
        }
    }

    /// Adds maps. They take precedence over unwind tables. Dropping the result removes them.
    ///
    /// The time is linear in the number of maps and in the number of earlier registrations. So register a module at a time, not a
    /// function.
    ///
    /// # Errors
    /// If a range is empty or larger than 2 GiB, or if a map overlaps another, new or old. Then nothing is added.
    ///
    /// ```
    /// use regrow::map::{Error, FrameMap, StackMaps};
    /// let maps = StackMaps::new();
    /// let registration = maps.register(vec![FrameMap::new(0x1000..0x1040)])?;
    /// let error = maps.register(vec![FrameMap::new(0x103f..0x1050)]).unwrap_err();
    /// assert_eq!(error, Error::Overlap { address: 0x103f });
    /// drop(registration);
    /// assert!(maps.register(vec![FrameMap::new(0x103f..0x1050)]).is_ok());
    /// # Ok::<(), Error>(())
    /// ```
    pub fn register(&self, maps: Vec<FrameMap>) -> Result<Registration<'_>, Error> {
        self.add(LayerName::Registered, maps).map(|(registration, _)| registration)
    }

    /// As [`register`](Self::register), into either layer. Also returns what the tables take.
    pub(super) fn add(
        &self,
        layer: LayerName,
        maps: Vec<FrameMap>,
    ) -> Result<(Registration<'_>, Size), Error> {
        let tables: Vec<_> = Table::build(maps)?.into_iter().map(Arc::new).collect();
        let size = Size {
            rows: tables.iter().map(|table| table.rows()).sum(),
            bytes: tables.iter().map(|table| table.bytes()).sum(),
        };
        let mut writer = self.lock();
        writer.last_number += 1;
        let number = writer.last_number;
        let all = &mut writer.tables[layer as usize];
        all.extend(tables.into_iter().map(|table| Numbered { number, table }));
        all.sort_by_key(|one| one.table.range().start); // it is sorted but for the new ones: cheap
        match self.publish(&mut writer) {
            Ok(()) => Ok((Registration { maps: self, layer, number }, size)),
            Err(error) => {
                writer.tables[layer as usize].retain(|one| one.number != number);
                Err(error)
            }
        }
    }

    /// Begins reading. It does not wait or allocate, and may be called in a signal handler.
    ///
    /// The result shows the maps of this moment. Changes made while it lives do not show in it, and memory is not freed meanwhile. No
    /// writer waits for it.
    ///
    /// ```
    /// use regrow::map::{FrameMap, StackMaps};
    /// let maps = StackMaps::new();
    /// let registration = maps.register(vec![FrameMap::new(0x1000..0x1040)]);
    /// let reader = maps.read();
    /// drop(registration);
    /// assert!(reader.find(0x1000).is_some()); // as when it began
    /// assert!(maps.read().find(0x1000).is_none());
    /// ```
    #[inline]
    pub fn read(&self) -> Reader<'_> {
        Reader(self.current.read())
    }

    fn lock(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self, layer: LayerName, number: u64) {
        let mut writer = self.lock();
        writer.tables[layer as usize].retain(|one| one.number != number);
        let published = self.publish(&mut writer);
        debug_assert!(published.is_ok(), "fewer tables cannot overlap more");
    }

    /// Makes the writer's tables the current ones. An error changes nothing.
    fn publish(&self, writer: &mut Writer) -> Result<(), Error> {
        // SAFETY: only a writer, who has the lock, replaces or frees it.
        let old_layers = self.current.current().map(|snapshot| unsafe { &snapshot.as_ref().layers });
        let layer = |index: usize| {
            let before = old_layers.map_or(&[][..], |layers| &layers[index]);
            segments(&writer.tables[index], before)
        };
        let new = NonNull::from(Box::leak(Box::new(Snapshot { layers: [layer(0)?, layer(1)?] })));
        // SAFETY: this writer has the lock, which guards the list of retired snapshots too. The new one is a box's, and
        // nothing but `free` frees it, or the drop of all.
        unsafe { self.current.replace(new, &mut writer.retired, |snapshot| free(snapshot)) };
        Ok(())
    }
}

/// # Safety
/// `publish` made it, it is not current any more, and nobody reads it.
unsafe fn free(snapshot: NonNull<Snapshot>) {
    // SAFETY: `publish` made it from a box; by the caller's word nobody uses it.
    drop(unsafe { Box::from_raw(snapshot.as_ptr()) });
}

/// The segments for tables in order of their addresses. What was merged `before` is not merged again.
fn segments(tables: &[Numbered], before: &[Segment]) -> Result<Layer, Error> {
    let mut segments = Vec::with_capacity(tables.len());
    let mut rest = tables;
    while let Some(first) = rest.first() {
        let mut end = first.table.range().end;
        let later = rest[1..].iter().take_while(|one| {
            let joins = one.table.range().start < end;
            if joins {
                end = end.max(one.table.range().end);
            }
            joins
        });
        let (group, others) = rest.split_at(1 + later.count());
        match group {
            [one] => segments.push(Segment::new(one.table.clone(), None)),
            _ => segments.extend(merged(group, before)?),
        }
        rest = others;
    }
    Ok(segments.into())
}

/// The segment for tables that overlap. (More than one if it would be too large.)
fn merged(group: &[Numbered], before: &[Segment]) -> Result<Vec<Segment>, Error> {
    let numbers: Box<[u64]> = group.iter().map(|one| one.number).collect();
    let range = group[0].table.range().start..group[group.len() - 1].table.range().end;
    let same = |one: &&Segment| one.merged.as_ref() == Some(&numbers) && range.contains(&one.start);
    let known: Vec<_> = before.iter().filter(same).cloned().collect();
    if !known.is_empty() {
        return Ok(known);
    }
    let tables = Table::build(group.iter().flat_map(|one| one.table.maps()).collect())?;
    Ok(tables.into_iter().map(|table| Segment::new(Arc::new(table), Some(numbers.clone()))).collect())
}

impl Segment {
    fn new(table: Arc<Table>, merged: Option<Box<[u64]>>) -> Self {
        let range = table.range();
        Self { start: range.start, length: range.end - range.start, table, merged }
    }

    #[inline]
    fn contains(&self, address: usize) -> bool {
        address.wrapping_sub(self.start) < self.length
    }
}

impl Drop for StackMaps {
    fn drop(&mut self) {
        let retired: Vec<_> = self.lock().retired.drain(..).map(Retired::value).collect();
        for snapshot in retired.into_iter().chain(self.current.current()) {
            // SAFETY: nobody else has `self`, so no reader is left, nor does anybody look for what is current.
            unsafe { free(snapshot) };
        }
    }
}

impl fmt::Debug for StackMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tables = self.lock().tables.each_ref().map(Vec::len);
        f.debug_struct("StackMaps").field("registered", &tables[0]).field("unwind", &tables[1]).finish()
    }
}

/// The maps that stacks are moved by. They can only be read here; [`map::register`](super::register) adds to them.
///
/// ```
/// let maps = regrow::map::process();
/// assert!(maps.read().find(8).is_none());
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ProcessMaps(pub(super) &'static StackMaps);

impl ProcessMaps {
    /// As [`StackMaps::read`].
    ///
    /// ```
    /// regrow::map::record_loaded_objects();
    /// let here = regrow::map::process as fn() -> _ as usize;
    /// assert!(regrow::map::process().read().find(here).is_some());
    /// ```
    #[inline]
    pub fn read(self) -> Reader<'static> {
        self.0.read()
    }
}

/// What tables take.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Size {
    pub rows: usize,
    pub bytes: usize,
}

/// Maps that were added. Dropping this removes them.
///
/// Drop it *after* the last frame of the code has returned and *before* the memory is used for other code.
///
/// ```
/// use regrow::map::{self, FrameMap, Registration};
/// /// Compiled code; when it is freed its maps go first.
/// struct Code {
///     maps: Registration<'static>,
///     memory: Vec<u8>,
/// }
/// let memory = vec![0xc3]; // ret
/// let address = memory.as_ptr() as usize;
/// // SAFETY: the map says nothing of the code's frames but that all in them is ambiguous, which is always true.
/// let maps = unsafe { map::register(vec![FrameMap::new(address..address + memory.len())])? };
/// let code = Code { maps, memory };
/// assert!(map::process().read().find(address).is_some());
/// drop(code);
/// assert!(map::process().read().find(address).is_none());
/// # Ok::<(), map::Error>(())
/// ```
#[must_use = "dropping it removes the maps"]
#[derive(Debug)]
pub struct Registration<'a> {
    maps: &'a StackMaps,
    layer: LayerName,
    number: u64,
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        self.maps.remove(self.layer, self.number);
    }
}

/// The maps of one moment; see [`StackMaps::read`].
///
/// ```
/// use regrow::map::{FrameMap, StackMaps};
/// let maps = StackMaps::new();
/// let reader = maps.read();
/// let _registration = maps.register(vec![FrameMap::new(1..9)]);
/// assert!(reader.find(1).is_none()); // this one began before
/// assert!(maps.read().find(1).is_some());
/// ```
pub struct Reader<'a>(Reading<'a, Snapshot>);

impl fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reader")
    }
}

impl Reader<'_> {
    /// The map of the frame whose code is at `address`. In interrupted code that is the instruction's address. In a caller it is the
    /// call's last byte, one below the return address. This does not allocate or panic.
    ///
    /// ```
    /// use regrow::map;
    /// map::record_loaded_objects();
    /// let reader = map::process().read();
    /// let function = map::process as fn() -> _ as usize;
    /// assert!(reader.find(function).is_some_and(|map| map.rules().is_some()));
    /// assert!(reader.find(8).is_none());
    /// ```
    #[inline]
    #[must_use]
    pub fn find(&self, address: usize) -> Option<Map<'_>> {
        self.find_near(address, &mut Hints::default())
    }

    /// As [`find`](Self::find), but it looks first where the last look-up found something.
    #[inline]
    pub(super) fn find_near<'a>(&'a self, address: usize, hints: &mut Hints<'a>) -> Option<Map<'a>> {
        let [registered, unwind] = &self.0.value?.layers;
        if !registered.is_empty()
            && let Some(words) = find(registered, address, &mut hints.registered)
        {
            let given = words.shape.rules.as_ref();
            let tables = || find(unwind, address, &mut hints.unwind)?.shape.rules.as_ref();
            return Some(Map { rules: given.or_else(tables), words });
        }
        let tables = find(unwind, address, &mut hints.unwind)?;
        Some(Map { rules: tables.shape.rules.as_ref(), words: tables })
    }
}

/// The segments, by layer, that the last look-up found. Code mostly calls code of its own object.
#[derive(Clone, Copy, Default)]
pub(super) struct Hints<'a> {
    registered: Option<&'a Segment>,
    unwind: Option<&'a Segment>,
}

#[inline]
fn find<'a>(layer: &'a Layer, address: usize, hint: &mut Option<&'a Segment>) -> Option<Entry<'a>> {
    let segment = match *hint {
        Some(segment) if segment.contains(address) => segment,
        _ => {
            let after = layer.partition_point(|segment| segment.start <= address);
            *hint = layer.get(after.wrapping_sub(1));
            (*hint)?
        }
    };
    if segment.contains(address) { segment.table.find(address) } else { None }
}

/// What is known about a frame; see [`Reader::find`].
///
/// ```
/// use regrow::map::{FrameMap, Register, StackMaps, Verdict};
/// let maps = StackMaps::new();
/// let map = FrameMap::at_return(0x1005).register(Register::RBX, Verdict::Data).rest(Verdict::Pointer);
/// let _registration = maps.register(vec![map]);
/// let reader = maps.read();
/// let found = reader.find(0x1004).unwrap();
/// assert_eq!((found.register(0), found.rest()), (Verdict::Data, Verdict::Pointer));
/// assert_eq!(found.rules(), None); // and nothing says where such a frame ends
/// ```
#[derive(Clone, Copy)]
pub struct Map<'a> {
    rules: Option<&'a Result<Rules, Unwalkable>>,
    words: Entry<'a>,
}

impl<'a> Map<'a> {
    /// How to get to the caller, or why that is impossible; `None` if the map gives only words.
    ///
    /// ```
    /// use regrow::map::{Cfa, FrameMap, Rules, StackMaps};
    /// let maps = StackMaps::new();
    /// let rules = Rules::new(Cfa::rsp(16));
    /// let _registration = maps.register(vec![FrameMap::new(1..5).rules(rules), FrameMap::new(5..9)]);
    /// assert_eq!(maps.read().find(4).unwrap().rules(), Some(Ok(rules)));
    /// assert_eq!(maps.read().find(5).unwrap().rules(), None);
    /// ```
    #[inline]
    #[must_use]
    pub fn rules(&self) -> Option<Result<Rules, Unwalkable>> {
        self.rules.copied()
    }

    /// As [`rules`](Self::rules), where they lie.
    #[inline]
    pub(super) fn rules_here(&self) -> Option<&'a Result<Rules, Unwalkable>> {
        self.rules
    }

    /// Who recorded the verdicts for its words.
    ///
    /// ```
    /// use regrow::map::{self, Source};
    /// map::record_loaded_objects();
    /// let reader = map::process().read();
    /// let map = reader.find(map::process as fn() -> _ as usize).unwrap();
    /// assert_eq!(map.source(), Source::EhFrame);
    /// ```
    #[must_use]
    pub fn source(&self) -> Source {
        self.words.shape.source
    }

    /// The verdict for the `index`th of [`Register::CALLEE_SAVED`], if the frame uses it itself; [`Verdict::Ambiguous`] if `index` is
    /// above 5. A register that the CFA is counted from is a pointer.
    ///
    /// ```
    /// use regrow::map::{Cfa, FrameMap, Register, Rules, StackMaps, Verdict};
    /// let maps = StackMaps::new();
    /// let map = FrameMap::new(1..9).rules(Rules::new(Cfa::rbp(16))).registers(Verdict::Data);
    /// let _registration = maps.register(vec![map]);
    /// let reader = maps.read();
    /// let verdict = |register: Register| reader.find(1).unwrap().register(register.saved_index().unwrap());
    /// assert_eq!(verdict(Register::R12), Verdict::Data);
    /// assert_eq!(verdict(Register::RBP), Verdict::Pointer); // to this very frame
    /// ```
    #[must_use]
    pub fn register(&self, index: usize) -> Verdict {
        let Some(&register) = Register::CALLEE_SAVED.get(index) else { return Verdict::Ambiguous };
        match self.rules {
            Some(Ok(rules)) if rules.is_counted_from(register) => Verdict::Pointer,
            _ => self.words.shape.register(index),
        }
    }

    /// The verdict for words without one of their own.
    ///
    /// ```
    /// use regrow::map::{FrameMap, StackMaps, Verdict};
    /// let maps = StackMaps::new();
    /// let _registration = maps.register(vec![FrameMap::new(1..9).rest(Verdict::Data)]);
    /// assert_eq!(maps.read().find(1).unwrap().rest(), Verdict::Data);
    /// ```
    #[inline]
    #[must_use]
    pub fn rest(&self) -> Verdict {
        self.words.shape.rest
    }

    /// True if all of its words are ambiguous.
    ///
    /// ```
    /// use regrow::map;
    /// map::record_loaded_objects();
    /// let reader = map::process().read();
    /// // Unwind tables say how to get to the caller, and nothing about words.
    /// assert!(reader.find(map::process as fn() -> _ as usize).unwrap().is_ambiguous());
    /// ```
    #[inline]
    #[must_use]
    pub fn is_ambiguous(&self) -> bool {
        self.rest() == Verdict::Ambiguous && self.words.runs().is_empty()
    }

    /// The places that the words with verdicts are counted from.
    pub(super) fn word_places(&self) -> impl Iterator<Item = Place> {
        self.words.runs().iter().map(|run| run.first)
    }

    /// The verdict for the word at `address`, if places have the addresses that `resolve` gives them.
    pub(super) fn word(&self, address: usize, resolve: impl Fn(Place) -> Option<usize>) -> Verdict {
        let within = |run: &Run| {
            let offset = address.wrapping_sub(resolve(run.first)?);
            let word = offset / size_of::<usize>();
            (offset % size_of::<usize>() == 0 && word < run.count as usize).then_some(word)
        };
        // A word may be in runs of several origins, in some of them only because they bridge it.
        let said = self.words.runs().iter().filter_map(|run| Some(self.words.verdict(run, within(run)?)));
        let strength = |verdict: &Verdict| match verdict {
            Verdict::Pointer => 2,
            Verdict::Ambiguous => 1,
            Verdict::Data => 0,
        };
        said.filter(|verdict| *verdict != self.rest()).max_by_key(strength).unwrap_or(self.rest())
    }
}

impl fmt::Debug for Map<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Map")
            .field("rules", &self.rules)
            .field("source", &self.source())
            .finish_non_exhaustive()
    }
}
