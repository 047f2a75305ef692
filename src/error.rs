//! Errors of making a coroutine, each with its remedy.
#![forbid(unsafe_code)]

use core::fmt;
use std::io;

use crate::size::{MAX_SIZE, MIN_SIZE};

/// The reason why a coroutine could not be created. No memory or slot is lost. The closure is dropped as if it had never
/// been passed.
///
/// ```
/// use regrow::{Builder, Error};
/// let error = Builder::new().first_size(3000).try_spawn(|_: &regrow::Yielder<(), ()>, ()| ()).unwrap_err();
/// assert!(matches!(error, Error::Size { .. }));
/// assert!(error.to_string().contains("power of two"));
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// A size is not a power of two, or not between [`MIN_SIZE`](crate::MIN_SIZE) and
    /// [`MAX_SIZE`](crate::MAX_SIZE) bytes.
    Size {
        /// The size in question: `"first_size"` or `"maximum"`.
        what: &'static str,
        /// The size asked for, in bytes.
        bytes: usize,
    },
    /// The first size is larger than the maximum.
    FirstAboveMaximum {
        /// The first size, in bytes.
        first: usize,
        /// The maximum, in bytes.
        maximum: usize,
    },
    /// The kernel refused memory or address space.
    ///
    /// The whole slot of a stack counts as address space (`ulimit -v`), used or not. Only touched pages count as memory.
    /// With `vm.overcommit_memory=2`, though, the kernel charges every writable page: the whole slot with guard markers,
    /// only its accessible part with page protection.
    Memory {
        /// The operation that failed.
        doing: &'static str,
        /// How many bytes regrow asked for.
        bytes: usize,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The process is close to its limit of memory mappings. Without `MADV_GUARD_INSTALL` (Linux before 6.13) each stack
    /// takes two. New stacks are refused while some mappings are left for the rest of the program.
    Mappings {
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A coroutine cannot have the stack it asked for; see [`reserve`](crate::reserve).
    Room {
        /// How many bytes the coroutine asked for.
        bytes: usize,
        /// Its maximum, in bytes.
        maximum: usize,
    },
    /// `/proc/self/mem` could not be opened, read or written. In a process with several threads, a stack that grows in
    /// place is frozen and thawed through it; see [`Coroutine::freeze`](crate::Coroutine::freeze).
    OwnMemory {
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The fault handler could not be installed.
    Handler {
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The table of arenas is full: some hundred billion bytes of stacks are in use.
    Arenas,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size { what, bytes } => write!(
                f,
                "{what} of {bytes} bytes: give a power of two from {} to {} bytes",
                MIN_SIZE, MAX_SIZE
            ),
            Self::FirstAboveMaximum { first, maximum } => write!(
                f,
                "the first size, {first} bytes, is above the maximum, {maximum} bytes: lower one or raise the other"
            ),
            Self::Memory { doing, bytes, source } => write!(
                f,
                "{doing}: the kernel refused {bytes} bytes ({}): end some coroutines, lower their maximum, \
                 or raise the limit on memory (ulimit -v, the container's, vm.overcommit_memory)",
                Answer(source)
            ),
            Self::Mappings { source } => write!(
                f,
                "too many memory mappings ({}): without MADV_GUARD_INSTALL (Linux 6.13), and in locked memory, each \
                 stack takes two; raise vm.max_map_count (sysctl -w vm.max_map_count=1048576) or use a newer kernel",
                Answer(source)
            ),
            Self::Room { bytes, maximum } => write!(
                f,
                "no room for {bytes} more bytes of stack (maximum {maximum}): raise Builder::maximum, or, if the stack is \
                 pinned or has a frame that may not move, start it larger with Builder::first_size"
            ),
            Self::OwnMemory { source } => write!(
                f,
                "cannot use /proc/self/mem ({}): among several threads, a stack that grows in place is frozen and \
                 thawed through it; mount /proc, allow openat, pread64 and pwrite64 in the sandbox, or use a stack that moves",
                Answer(source)
            ),
            Self::Handler { source } => write!(
                f,
                "cannot install the SIGSEGV handler or its alternate stack ({}): stacks cannot grow without it; \
                 allow rt_sigaction, sigaltstack and mmap in the sandbox",
                Answer(source)
            ),
            Self::Arenas => f.write_str("the table of stack arenas is full: end some coroutines"),
        }
    }
}

/// Formats the kernel's answer like `io::Error`, but without a `String`, since the fault handler writes it too.
struct Answer<'a>(&'a io::Error);

impl fmt::Display for Answer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(number) = self.0.raw_os_error() else { return self.0.kind().fmt(f) };
        let name = match number {
            libc::EPERM => "Operation not permitted ",
            libc::ENOENT => "No such file or directory ",
            libc::EIO => "Input/output error ",
            libc::EAGAIN => "Resource temporarily unavailable ",
            libc::ENOMEM => "Cannot allocate memory ",
            libc::EACCES => "Permission denied ",
            libc::EFAULT => "Bad address ",
            libc::EINVAL => "Invalid argument ",
            libc::ENFILE => "Too many open files in system ",
            libc::EMFILE => "Too many open files ",
            libc::ENOSYS => "Function not implemented ",
            _ => "",
        };
        write!(f, "{name}(os error {number})")
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Memory { source, .. }
            | Self::Mappings { source }
            | Self::OwnMemory { source }
            | Self::Handler { source } => Some(source),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_answers_reads_as_std_writes_it() {
        let known = [
            libc::EPERM,
            libc::ENOENT,
            libc::EIO,
            libc::EAGAIN,
            libc::ENOMEM,
            libc::EACCES,
            libc::EFAULT,
            libc::EINVAL,
            libc::ENFILE,
            libc::EMFILE,
            libc::ENOSYS,
        ];
        for number in known {
            let error = io::Error::from_raw_os_error(number);
            assert_eq!(Answer(&error).to_string(), error.to_string());
        }
        assert_eq!(Answer(&io::Error::from_raw_os_error(libc::ERANGE)).to_string(), "(os error 34)");
    }
}
