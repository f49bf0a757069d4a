//! A container's name, checked once so that it can be a folder's name ever after.

use std::fmt;

/// 1 to 255 bytes of letters, digits and `_ + - .`, and neither `.` nor `..`; runc's rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerId(String);

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("invalid container ID {0:?}: letters, digits and _ + - . are allowed, 255 at most")]
pub struct IdError(String);

impl ContainerId {
    pub fn parse(text: &str) -> Result<Self, IdError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
        // A file name's limit (NAME_MAX).
        let fits = (1..=255).contains(&text.len());
        if fits && text.chars().all(allowed) && text != "." && text != ".." {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdError(text.chars().take(300).collect()))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        for bad in ["", ".", "..", "a/b", "a b", "ä", &"x".repeat(256)] {
            assert!(ContainerId::parse(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "...", "A_b+c-1.2", &"x".repeat(255)] {
            assert!(ContainerId::parse(good).is_ok(), "{good:?}");
        }
    }
}
