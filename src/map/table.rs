//! One table of frame maps: sorted, compact, and never changed after it is made.
//!
//! ```text
//!   address ─ start ─► buckets[offset >> shift]      where to begin in the rows
//!                        │
//!                      offsets   one u32 for each row, which is valid up to the next row's offset
//!                        │
//!                      numbers   one u32 for each row: of its shape
//!                        │
//!                      shapes    rules, default verdicts, which runs    64 bytes, each different one once
//!                        │
//!                      runs      | first word's place | count | bits |  words that a verdict was given for
//!                        │
//!                      bits      two for each word, four words a byte
//! ```
//!
//! There is about one bucket for four rows, so the row is one of the first few of its bucket. These are compared at once, without a branch. A
//! look-up reads four cache lines, whatever the size of the table.
#![forbid(unsafe_code)]

use core::ops::Range;
use std::collections::HashMap;

use super::error::Error;
use super::frame_map::{FrameMap, Origin, Place, Rules, SAVED, Source, Unwalkable, Verdict};

/// The rows of a table cover less than this.
const MOST_SPAN: usize = 1 << 31;
/// Two maps further apart than this go into different tables, which saves the buckets in between.
const MOST_GAP: usize = 1 << 20;
/// How many rows there are to a bucket, at most, on average.
const ROWS_PER_BUCKET: usize = 4;
/// How many rows from a bucket's first on are compared at once.
const WINDOW: usize = 8;
/// A run of words that have a verdict does not bridge more words without one.
const MOST_FILL: i64 = 64 * WORD;
/// The shape of a row for addresses without a map.
const GAP: u32 = u32::MAX;

const WORD: i64 = size_of::<usize>() as i64;

/// A frame map without its addresses.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(super) struct Shape {
    pub rules: Option<Result<Rules, Unwalkable>>,
    pub rest: Verdict,
    pub source: Source,
    /// Two bits for each callee-saved register.
    registers: u16,
    run: u32,
    runs: u16,
}

const _: () = assert!(size_of::<Shape>() == 64, "a shape is one cache line");

impl Shape {
    pub(super) fn register(&self, index: usize) -> Verdict {
        Verdict::from_bits((self.registers >> (2 * index)) as u8)
    }
}

/// Neighbouring words with verdicts.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub first: Place,
    /// In words.
    pub count: u32,
    /// Index of the first byte of its bits.
    bits: u32,
}

/// What a table knows about an address.
#[derive(Clone, Copy)]
pub(super) struct Entry<'a> {
    table: &'a Table,
    pub shape: &'a Shape,
}

impl<'a> Entry<'a> {
    /// The runs of words that a verdict was given for.
    pub(super) fn runs(self) -> &'a [Run] {
        let first = self.shape.run as usize;
        self.table.runs.get(first..first + usize::from(self.shape.runs)).unwrap_or_default()
    }

    /// The verdict for a word of a run.
    pub(super) fn verdict(self, run: &Run, word: usize) -> Verdict {
        let byte = self.table.bits.get(run.bits as usize + word / 4);
        byte.map_or(self.shape.rest, |byte| Verdict::from_bits(byte >> (word % 4 * 2)))
    }
}

/// A sorted table of frame maps that do not overlap.
pub(super) struct Table {
    start: usize,
    /// One past the last address that a map is for.
    end: usize,
    shift: u32,
    /// For each 2^shift bytes: the last row at or before the first of them. And one for the end.
    buckets: Box<[u32]>,
    /// Where the rows begin; then [`WINDOW`] times a number that no offset reaches.
    offsets: Box<[u32]>,
    /// The rows' shapes.
    numbers: Box<[u32]>,
    shapes: Box<[Shape]>,
    runs: Box<[Run]>,
    bits: Box<[u8]>,
}

impl Table {
    pub(super) fn range(&self) -> Range<usize> {
        self.start..self.end
    }

    pub(super) fn rows(&self) -> usize {
        self.numbers.len()
    }

    /// Memory it takes, in bytes.
    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>()
            + size_of_val(&*self.buckets)
            + size_of_val(&*self.offsets)
            + size_of_val(&*self.numbers)
            + size_of_val(&*self.shapes)
            + size_of_val(&*self.runs)
            + size_of_val(&*self.bits)
    }

    /// What is known about `address`. Neither allocates nor panics.
    #[inline]
    pub(super) fn find(&self, address: usize) -> Option<Entry<'_>> {
        if !self.range().contains(&address) {
            return None;
        }
        let offset = (address - self.start) as u32; // below MOST_SPAN
        let bucket = (offset >> self.shift) as usize;
        let first = *self.buckets.get(bucket)? as usize;
        let window: &[u32; WINDOW] = self.offsets.get(first..)?.first_chunk()?;
        // Row `first` begins at or before the bucket, so at least one row does.
        let mut count = window.iter().map(|&begin| u32::from(begin <= offset)).sum::<u32>() as usize;
        if count == WINDOW {
            count = self.count_from(first, bucket, offset)?;
        }
        let number = *self.numbers.get(first.wrapping_add(count).wrapping_sub(1))?;
        Some(Entry { table: self, shape: self.shapes.get(number as usize)? }) // GAP has no shape
    }

    /// How many rows of a bucket begin at or before `offset`.
    #[cold]
    fn count_from(&self, first: usize, bucket: usize, offset: u32) -> Option<usize> {
        let last = *self.buckets.get(bucket + 1)? as usize;
        Some(self.offsets.get(first..=last)?.partition_point(|&begin| begin <= offset))
    }

    /// Its maps again, in order. Neighbours that say the same are one map.
    pub(super) fn maps(&self) -> impl Iterator<Item = FrameMap> {
        let begins = self.offsets.iter().map(|&offset| self.start + offset as usize);
        let ends = begins.clone().take(self.rows()).skip(1).chain([self.end]);
        let rows = begins.zip(ends).zip(&self.numbers);
        rows.filter(|(_, number)| **number != GAP).map(|((begin, end), number)| {
            let shape = &self.shapes[*number as usize];
            let entry = Entry { table: self, shape };
            let words = entry.runs().iter().flat_map(|run| {
                (0..run.count).filter_map(move |word| {
                    let place = run.first.plus(i64::from(word) * WORD)?;
                    Some((place, entry.verdict(run, word as usize)))
                })
            });
            FrameMap {
                range: begin..end,
                rules: shape.rules,
                words: words.collect(),
                rest: shape.rest,
                registers: core::array::from_fn(|index| shape.register(index)),
                source: shape.source,
            }
        })
    }

    /// Tables for `maps`, which may come in any order: one table, or several if the maps lie far apart.
    ///
    /// # Errors
    /// If a range is empty, or two overlap.
    pub(super) fn build(mut maps: Vec<FrameMap>) -> Result<Vec<Self>, Error> {
        maps.sort_by_key(|map| map.range.start);
        let mut tables = Vec::new();
        let mut builder: Option<Builder> = None;
        for map in &maps {
            if let Some(full) = builder.take_if(|builder| !builder.takes(&map.range)) {
                tables.push(full.finish());
            }
            builder.get_or_insert_with(|| Builder::new(map.range.start)).push(map)?;
        }
        tables.extend(builder.map(Builder::finish));
        Ok(tables)
    }
}

/// All but the addresses of a map; words in order, by origin.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    rules: Option<Result<Rules, Unwalkable>>,
    words: Vec<(Place, Verdict)>,
    rest: Verdict,
    registers: u16,
    source: Source,
}

/// A table in the making.
struct Builder {
    start: usize,
    end: usize,
    offsets: Vec<u32>,
    numbers: Vec<u32>,
    shapes: Vec<Shape>,
    runs: Vec<Run>,
    bits: Vec<u8>,
    known: HashMap<Key, u32>,
}

impl Builder {
    fn new(start: usize) -> Self {
        Self {
            start,
            end: start,
            offsets: Vec::new(),
            numbers: Vec::new(),
            shapes: Vec::new(),
            runs: Vec::new(),
            bits: Vec::new(),
            known: HashMap::new(),
        }
    }

    /// True if a map for `range`, which begins after all so far, belongs into this table.
    fn takes(&self, range: &Range<usize>) -> bool {
        range.start.saturating_sub(self.end) <= MOST_GAP && range.end.saturating_sub(self.start) < MOST_SPAN
    }

    fn push(&mut self, map: &FrameMap) -> Result<(), Error> {
        let Range { start, end } = map.range;
        if start >= end || end - start >= MOST_SPAN {
            return Err(Error::Range { start, end });
        }
        if start < self.end {
            return Err(Error::Overlap { address: start });
        }
        if start > self.end {
            self.push_row(self.end, GAP);
        }
        let shape = self.shape(map);
        self.push_row(start, shape);
        self.end = end;
        Ok(())
    }

    fn push_row(&mut self, address: usize, shape: u32) {
        if self.numbers.last() != Some(&shape) {
            self.offsets.push((address - self.start) as u32);
            self.numbers.push(shape);
        }
    }

    /// The number of the map's shape, a new one if it is new.
    fn shape(&mut self, map: &FrameMap) -> u32 {
        let key = Key {
            rules: map.rules,
            words: normalised(&map.words),
            rest: map.rest,
            registers: (0..SAVED).map(|index| u16::from(map.registers[index].bits()) << (2 * index)).sum(),
            source: map.source,
        };
        if let Some(&known) = self.known.get(&key) {
            return known;
        }
        let run = self.runs.len() as u32;
        self.push_runs(&key.words, key.rest);
        self.shapes.push(Shape {
            rules: key.rules,
            rest: key.rest,
            source: key.source,
            registers: key.registers,
            run,
            runs: (self.runs.len() as u32 - run).try_into().unwrap_or(u16::MAX),
        });
        let number = self.shapes.len() as u32 - 1;
        self.known.insert(key, number);
        number
    }

    /// Makes runs of words that are sorted; the words between them get the verdict `rest`.
    fn push_runs(&mut self, words: &[(Place, Verdict)], rest: Verdict) {
        let mut rest_of_words = words;
        while let Some(&(first, _)) = rest_of_words.first() {
            let joins = |pair: &[(Place, Verdict)]| {
                pair[0].0.origin() == pair[1].0.origin()
                    && i64::from(pair[1].0.offset() - first.offset()) % WORD == 0
                    && i64::from(pair[1].0.offset() - pair[0].0.offset()) <= MOST_FILL
            };
            let length = rest_of_words.windows(2).take_while(|pair| joins(pair)).count() + 1;
            let (run, later) = rest_of_words.split_at(length);
            let index = |place: Place| ((place.offset() - first.offset()) / WORD as i32) as usize;
            let count = index(run[length - 1].0) + 1;
            let mut verdicts = vec![rest; count];
            for &(place, verdict) in run {
                verdicts[index(place)] = verdict;
            }
            self.runs.push(Run { first, count: count as u32, bits: self.bits.len() as u32 });
            let packed = verdicts
                .chunks(4)
                .map(|four| four.iter().rev().fold(0, |byte, verdict| byte << 2 | verdict.bits()));
            self.bits.extend(packed);
            rest_of_words = later;
        }
    }

    fn finish(mut self) -> Table {
        let span = self.end - self.start;
        let rows = self.numbers.len();
        let mut shift = 0;
        while span >> shift > rows / ROWS_PER_BUCKET + 1 {
            shift += 1;
        }
        let mut buckets: Vec<u32> = Vec::with_capacity((span >> shift) + 2);
        let mut row = 0;
        for bucket in 0..=span >> shift {
            while self.offsets.get(row + 1).is_some_and(|&next| next as usize <= bucket << shift) {
                row += 1;
            }
            buckets.push(row as u32);
        }
        buckets.push(rows as u32 - 1);
        self.offsets.extend([u32::MAX; WINDOW]);
        Table {
            start: self.start,
            end: self.end,
            shift,
            buckets: buckets.into(),
            offsets: self.offsets.into(),
            numbers: self.numbers.into(),
            shapes: self.shapes.into(),
            runs: self.runs.into(),
            bits: self.bits.into(),
        }
    }
}

/// The words by origin and offset, the last verdict for each. Those without an address are left out.
fn normalised(words: &[(Place, Verdict)]) -> Vec<(Place, Verdict)> {
    let rank = |place: Place| match place.origin() {
        Origin::Register(register) => Some(register.dwarf()),
        Origin::Cfa => Some(16),
        Origin::Same | Origin::Undefined => None,
    };
    let mut sorted: Vec<_> = words.iter().copied().filter(|(place, _)| rank(*place).is_some()).collect();
    sorted.sort_by_key(|(place, _)| (rank(*place), place.offset())); // stable: the last of equals stays last
    sorted.reverse();
    sorted.dedup_by_key(|(place, _)| *place); // keeps the first of equals, which was the last
    sorted.reverse();
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::frame_map::{Cfa, Register};
    use proptest::prelude::*;

    /// Maps that do not overlap, in order: gaps and lengths, mostly small.
    fn maps() -> impl Strategy<Value = Vec<FrameMap>> {
        let gap = prop_oneof![4 => Just(0), 4 => 1..100usize, 1 => 1..5_000_000usize];
        let length = prop_oneof![1 => Just(1), 4 => 1..40usize, 1 => 1..100_000usize];
        let word = ((-8..8i32), any::<bool>(), 0..3u8);
        let map = (gap, length, 0..6i32, prop::collection::vec(word, 0..4), 0..3u8);
        prop::collection::vec(map, 0..60).prop_map(|all| {
            let mut at = 0x5555_0000_0000;
            let mut maps = Vec::new();
            for (gap, length, size, words, rest) in all {
                at += gap;
                let mut map = FrameMap::new(at..at + length).rest(Verdict::from_bits(rest));
                if size > 0 {
                    map = map.rules(Rules::new(Cfa::rsp(size * 8)));
                }
                for (offset, from_cfa, verdict) in words {
                    let register = if from_cfa { None } else { Some(Register::RSP) };
                    let place = Place::checked(register, i64::from(offset) * 8).unwrap();
                    map = map.word(place, Verdict::from_bits(verdict));
                }
                maps.push(map);
                at += length;
            }
            maps
        })
    }

    /// Every verdict a map gives, by place.
    fn verdict(words: &[(Place, Verdict)], rest: Verdict, place: Place) -> Verdict {
        words.iter().rev().find(|(at, _)| *at == place).map_or(rest, |(_, verdict)| *verdict)
    }

    fn check(map: Option<&FrameMap>, entry: Option<Entry<'_>>) {
        let (Some(map), Some(entry)) = (map, entry) else {
            assert_eq!(map.is_some(), entry.is_some());
            return;
        };
        assert_eq!(entry.shape.rules, map.rules);
        let words = FrameMap::words_of(entry);
        for offset in -8..8 {
            for place in [Place::cfa(offset * 8), Place::at(Register::RSP, offset * 8)] {
                assert_eq!(
                    verdict(&words, entry.shape.rest, place),
                    verdict(&map.words, map.rest, place),
                    "{place} of {map:?}"
                );
            }
        }
    }

    impl FrameMap {
        fn words_of(entry: Entry<'_>) -> Vec<(Place, Verdict)> {
            let word = |run: Run, at: u32| {
                (run.first.plus(i64::from(at) * WORD).unwrap(), entry.verdict(&run, at as usize))
            };
            entry.runs().iter().flat_map(|run| (0..run.count).map(move |at| word(*run, at))).collect()
        }
    }

    proptest! {
        /// Looking up equals searching the list of maps one by one, at and around every boundary and elsewhere.
        #[test]
        fn a_table_is_its_list_of_maps(maps in maps(), others in prop::collection::vec(0..6_000_000usize, 20)) {
            let tables = Table::build(maps.iter().rev().cloned().collect()).unwrap();
            let start = maps.first().map_or(0, |map| map.range.start);
            let edges = maps.iter().flat_map(|map| [map.range.start, map.range.end]);
            let near = edges.flat_map(|edge| [edge - 1, edge, edge + 1]);
            for address in near.chain(others.into_iter().map(|other| start + other)) {
                let naive = maps.iter().find(|map| map.range.contains(&address));
                let found: Vec<_> = tables.iter().filter_map(|table| table.find(address)).collect();
                prop_assert!(found.len() <= 1);
                check(naive, found.first().copied());
            }
        }

        /// A table made of a table's maps is the same table.
        #[test]
        fn maps_come_out_as_they_went_in(maps in maps()) {
            for table in Table::build(maps).unwrap() {
                let out: Vec<_> = table.maps().collect();
                let again = Table::build(out.clone()).unwrap();
                prop_assert_eq!(again.len(), 1);
                prop_assert_eq!(again[0].maps().collect::<Vec<_>>(), out);
            }
        }
    }

    #[test]
    fn overlapping_and_empty_ranges_are_refused() {
        let maps = vec![FrameMap::new(10..20), FrameMap::new(19..30)];
        assert!(matches!(Table::build(maps), Err(Error::Overlap { address: 19 })));
        assert!(matches!(Table::build(vec![FrameMap::new(7..7)]), Err(Error::Range { start: 7, end: 7 })));
    }
}
