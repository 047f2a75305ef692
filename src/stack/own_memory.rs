//! This process's memory through `/proc/self/mem`, read and written regardless of protection.
//!
//! The file is opened once. Each use first checks that the descriptor is still that file, since a program may close
//! unknown descriptors. In a child made by `fork` the file would be the parent's memory, so a child does not inherit the
//! descriptor's record. (Process ids cannot tell them apart: in a new pid namespace the child of process 1 is also
//! process 1.) The fault handler uses this module, so it makes only system calls.

use core::ffi::c_int;
use core::sync::atomic::{AtomicU64, Ordering};
use std::io;

use super::guard::NotInherited;
use crate::error::Error;

/// The open descriptor and bits of its inode number. 0 while this process has not opened the file.
static KEPT: NotInherited = NotInherited::new();

const INODE_BITS: u32 = 40;
const DESCRIPTOR_BITS: u32 = 20;

/// `/proc/self/mem`, open.
pub(crate) struct OwnMemory {
    file: c_int,
    /// The descriptor stays open.
    kept: bool,
}

impl Drop for OwnMemory {
    fn drop(&mut self) {
        if !self.kept {
            // SAFETY: `open` opened this descriptor and did not keep it, so no other code knows its number.
            unsafe { libc::close(self.file) };
        }
    }
}

impl OwnMemory {
    /// An error if the file does not exist or may not be opened.
    pub(crate) fn open() -> Result<Self, Error> {
        let kept = KEPT.get_or_make();
        let known = kept.map_or(0, |kept| kept.load(Ordering::Acquire));
        if known != 0 && describe(descriptor(known)) == Some(known) {
            return Ok(Self { file: descriptor(known), kept: true });
        }
        // SAFETY: the path is a constant that ends in a zero byte.
        let file = unsafe { libc::open(c"/proc/self/mem".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
        if file < 0 {
            return Err(failed());
        }
        // Not kept if another thread was faster or the descriptor is too large.
        let publish = |kept: &AtomicU64, new| {
            kept.compare_exchange(known, new, Ordering::AcqRel, Ordering::Acquire).is_ok()
        };
        let kept = kept.zip(describe(file)).is_some_and(|(kept, new)| publish(kept, new));
        Ok(Self { file, kept })
    }

    /// Reads `bytes` at address `from`, accessible or not. An error if any could not be read.
    ///
    /// # Safety
    /// `to` is valid for writes of `bytes`.
    pub(crate) unsafe fn read(&self, from: usize, to: *mut u8, bytes: usize) -> Result<(), Error> {
        // SAFETY: `all` asks for at most `bytes`, for which `to` is valid.
        all(bytes, |done| unsafe {
            libc::pread(self.file, to.add(done).cast(), bytes - done, (from + done) as libc::off_t)
        })
    }

    /// Writes `bytes` to address `to`, accessible or not. An error if any could not be written.
    ///
    /// # Safety
    /// `from` is valid for reads of `bytes`, and the caller may change the bytes at `to`.
    pub(crate) unsafe fn write(&self, to: usize, from: *const u8, bytes: usize) -> Result<(), Error> {
        // SAFETY: `all` asks for at most `bytes`. `from` is valid for reading them, and those at `to` may be changed.
        all(bytes, |done| unsafe {
            libc::pwrite(self.file, from.add(done).cast(), bytes - done, (to + done) as libc::off_t)
        })
    }
}

/// Repeats a transfer until all bytes are moved.
fn all(bytes: usize, mut transfer: impl FnMut(usize) -> isize) -> Result<(), Error> {
    let mut done = 0;
    while done < bytes {
        match transfer(done) {
            moved @ 1.. => done += moved as usize,
            -1 if io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
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

/// The record of a descriptor of this process, as in [`KEPT`].
fn describe(descriptor: c_int) -> Option<u64> {
    // SAFETY: zeros are a valid `stat`, which the kernel fills in.
    unsafe {
        let mut about: libc::stat = core::mem::zeroed();
        if descriptor >= 1 << DESCRIPTOR_BITS || libc::fstat(descriptor, &mut about) != 0 {
            return None;
        }
        let inode = (about.st_ino ^ about.st_dev << 7) & ((1 << INODE_BITS) - 1);
        Some(1 << (INODE_BITS + DESCRIPTOR_BITS) | (descriptor as u64) << INODE_BITS | inode)
    }
}
