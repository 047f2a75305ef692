//! The string routines of libc, which may hold the difference of two pointers in a register.

use core::ffi::CStr;
use core::ops::Range;
use std::sync::OnceLock;

use super::functions::{holding, loaded_objects};

/// The functions that libraries write by hand, with a variant for each kind of processor.
const NAMES: [&CStr; 53] = [
    c"bcmp",
    c"bcopy",
    c"bzero",
    c"index",
    c"rindex",
    c"memccpy",
    c"memchr",
    c"memcmp",
    c"memcpy",
    c"memmove",
    c"mempcpy",
    c"memrchr",
    c"memset",
    c"rawmemchr",
    c"stpcpy",
    c"stpncpy",
    c"strcasecmp",
    c"strcasecmp_l",
    c"strcat",
    c"strchr",
    c"strchrnul",
    c"strcmp",
    c"strcpy",
    c"strcspn",
    c"strlen",
    c"strncasecmp",
    c"strncasecmp_l",
    c"strncat",
    c"strncmp",
    c"strncpy",
    c"strnlen",
    c"strpbrk",
    c"strrchr",
    c"strspn",
    c"strstr",
    c"wcscat",
    c"wcschr",
    c"wcscmp",
    c"wcscpy",
    c"wcslen",
    c"wcsncmp",
    c"wcsncpy",
    c"wcsnlen",
    c"wcsrchr",
    c"wmemchr",
    c"wmemcmp",
    c"wmemset",
    c"__memcpy_chk",
    c"__memmove_chk",
    c"__mempcpy_chk",
    c"__memset_chk",
    c"__memcmpeq",
    c"__strcpy_chk",
];

/// The address ranges of the routines in use, sorted.
pub(super) fn ranges() -> &'static [Range<usize>] {
    static RANGES: OnceLock<Vec<Range<usize>>> = OnceLock::new();
    RANGES.get_or_init(|| {
        let objects = loaded_objects();
        let mut ranges: Vec<_> = NAMES
            .into_iter()
            .filter_map(resolved)
            .collect::<Vec<_>>()
            .into_iter()
            .filter_map(|entry| objects.iter().find_map(|object| holding(&object.functions, entry).cloned()))
            .collect();
        ranges.sort_unstable_by_key(|range| range.start);
        ranges.dedup();
        ranges
    })
}

/// The variant of a function that the dynamic linker chose for this processor.
fn resolved(name: &CStr) -> Option<usize> {
    // SAFETY: the name ends with a zero byte, and the call only looks it up.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) } as usize;
    (address != 0).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_routine_behind_memcpy_is_one_and_malloc_is_none() {
        let address = |name| resolved(name).unwrap();
        assert!(holding(ranges(), address(c"memcpy")).is_some());
        assert!(holding(ranges(), address(c"memcpy") + 16).is_some());
        assert!(holding(ranges(), address(c"strlen")).is_some());
        assert!(holding(ranges(), address(c"malloc")).is_none());
        assert!(holding(ranges(), address(c"qsort")).is_none());
    }
}
