//! This process's memory through `/proc/self/mem`: read and written whatever its protection says.
//!
//! The file is opened once. Before each use it is made sure that it is still that file, and of this process: after a
//! `fork` it would be the parent's memory, and a program may close descriptors it knows nothing of. The fault handler uses
//! it, too: system calls only.

use core::ffi::c_int;
use core::sync::atomic::{AtomicU64, Ordering};
use std::io;

use crate::error::Error;

/// The open file: process id, descriptor, and bits of the inode's number. 0: not opened yet.
static FILE: AtomicU64 = AtomicU64::new(0);

const INODE_BITS: u32 = 22;
const DESCRIPTOR_BITS: u32 = 20;

/// `/proc/self/mem`, open.
pub(crate) struct OwnMemory(c_int);

impl OwnMemory {
    /// An error where there is no such file, or it may not be opened.
    pub(crate) fn open() -> Result<Self, Error> {
        let known = FILE.load(Ordering::Acquire);
        if known != 0 && describe(descriptor(known)) == Some(known) {
            return Ok(Self(descriptor(known)));
        }
        // SAFETY: a constant path; the descriptor is ours until it is published.
        unsafe {
            let file = libc::open(c"/proc/self/mem".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
            if file < 0 {
                return Err(failed());
            }
            let new = describe(file);
            let published = new.is_some_and(|new| {
                FILE.compare_exchange(known, new, Ordering::AcqRel, Ordering::Acquire).is_ok()
            });
            if published {
                return Ok(Self(file));
            }
            libc::close(file);
        }
        // Another thread was faster; or the descriptor is too large to be kept, then it still is `known`.
        let other = FILE.load(Ordering::Acquire);
        let too_large = || Error::OwnMemory { source: io::Error::from_raw_os_error(libc::EMFILE) };
        (other != known).then(|| Self(descriptor(other))).ok_or_else(too_large)
    }

    /// Reads `bytes` at the address `from`, with or without access to it. An error if it could not read all.
    ///
    /// # Safety
    /// `to` is valid for writes of `bytes`.
    pub(crate) unsafe fn read(&self, from: usize, to: *mut u8, bytes: usize) -> Result<(), Error> {
        // SAFETY: by the caller's word.
        all(bytes, |done| unsafe {
            libc::pread(self.0, to.add(done).cast(), bytes - done, (from + done) as libc::off_t)
        })
    }

    /// Writes `bytes` to the address `to`, with or without access to it. An error if it could not write all.
    ///
    /// # Safety
    /// `from` is valid for reads of `bytes`; what is at `to` is the caller's to change.
    pub(crate) unsafe fn write(&self, to: usize, from: *const u8, bytes: usize) -> Result<(), Error> {
        // SAFETY: by the caller's word.
        all(bytes, |done| unsafe {
            libc::pwrite(self.0, from.add(done).cast(), bytes - done, (to + done) as libc::off_t)
        })
    }
}

/// Repeats a transfer until all bytes are through.
fn all(bytes: usize, mut transfer: impl FnMut(usize) -> isize) -> Result<(), Error> {
    let mut done = 0;
    while done < bytes {
        match transfer(done) {
            moved @ 1.. => done += moved as usize,
            // SAFETY: errno is this thread's.
            -1 if unsafe { *libc::__errno_location() } == libc::EINTR => {}
            _ => return Err(failed()),
        }
    }
    Ok(())
}

fn failed() -> Error {
    Error::OwnMemory { source: io::Error::last_os_error() }
}

const fn descriptor(file: u64) -> c_int {
    (file >> INODE_BITS & ((1 << DESCRIPTOR_BITS) - 1)) as c_int
}

/// What [`FILE`] says of a descriptor in this process.
fn describe(descriptor: c_int) -> Option<u64> {
    // SAFETY: plain data for system calls.
    unsafe {
        let mut about: libc::stat = core::mem::zeroed();
        if descriptor >= 1 << DESCRIPTOR_BITS || libc::fstat(descriptor, &mut about) != 0 {
            return None;
        }
        let inode = (about.st_ino ^ about.st_dev << 7) & ((1 << INODE_BITS) - 1);
        let process = libc::getpid() as u64;
        Some(process << (INODE_BITS + DESCRIPTOR_BITS) | (descriptor as u64) << INODE_BITS | inode)
    }
}
