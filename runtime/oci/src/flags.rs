//! Command line flags as Go's `flag` package and urfave/cli take them, since engines call us as
//! they call runc: one dash or two, `-name=value` or `-name value`, booleans without a value.
//!
//! What it does not do: it knows no verb and gives no meaning to any flag.

/// What follows a flag's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    Nothing,
    Value,
}

/// One flag that a verb knows.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    /// The long name first; `Parsed` is asked by it. Others are spellings of the same flag.
    pub names: &'static [&'static str],
    pub takes: Takes,
}

/// A flag without a value.
pub const fn switch(names: &'static [&'static str]) -> Flag {
    Flag { names, takes: Takes::Nothing }
}

/// A flag with a value.
pub const fn value(names: &'static [&'static str]) -> Flag {
    Flag { names, takes: Takes::Value }
}

/// Where flags end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// At the first argument that is no flag, as for `exec` and for the flags before the verb.
    FlagsFirst,
    /// Nowhere: flags after positional arguments count too, until `--`.
    Mixed,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FlagError {
    #[error("flag provided but not defined: -{0}")]
    Unknown(String),
    #[error("flag needs an argument: -{0}")]
    NeedsValue(String),
    #[error("invalid boolean value \"{value}\" for -{name}")]
    NotBoolean { name: String, value: String },
    #[error("invalid value \"{value}\" for flag -{name}: {expected} expected")]
    BadValue { name: &'static str, value: String, expected: &'static str },
}

/// The flags that were given, and what stood beside them.
#[derive(Debug, Default)]
pub struct Parsed {
    given: Vec<(&'static str, String)>,
    pub positional: Vec<String>,
}

impl Parsed {
    /// Whether the switch `name` is on; given twice, the last counts.
    pub fn on(&self, name: &str) -> bool {
        self.last(name) == Some("true")
    }

    /// The value of `name`; given twice, the last counts.
    pub fn last(&self, name: &str) -> Option<&str> {
        self.given.iter().rev().find(|(given, _)| *given == name).map(|(_, value)| value.as_str())
    }

    /// Every value of `name`, in order.
    pub fn all(&self, name: &str) -> Vec<String> {
        self.given.iter().filter(|(given, _)| *given == name).map(|(_, v)| v.clone()).collect()
    }

    /// The value of `name` as a number.
    pub fn number<N: std::str::FromStr>(&self, name: &'static str) -> Result<Option<N>, FlagError> {
        self.last(name)
            .map(|text| {
                text.trim().parse().map_err(|_| FlagError::BadValue {
                    name,
                    value: text.to_owned(),
                    expected: "a number",
                })
            })
            .transpose()
    }
}

/// Sorts `args` into flags and positional arguments.
pub fn parse(known: &[Flag], order: Order, args: &[String]) -> Result<Parsed, FlagError> {
    let mut parsed = Parsed::default();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        if arg == "--" {
            parsed.positional.extend(rest.cloned());
            break;
        }
        // A lone dash is a value: standard input.
        let Some(stripped) = arg.strip_prefix('-').filter(|stripped| !stripped.is_empty()) else {
            parsed.positional.push(arg.clone());
            if order == Order::FlagsFirst {
                parsed.positional.extend(rest.cloned());
                break;
            }
            continue;
        };
        let stripped = stripped.strip_prefix('-').unwrap_or(stripped);
        let (name, attached) = match stripped.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (stripped, None),
        };
        let flag = known
            .iter()
            .find(|flag| flag.names.contains(&name))
            .ok_or_else(|| FlagError::Unknown(name.to_owned()))?;
        let long = flag.names.first().expect("every flag has a name");
        let value = match flag.takes {
            Takes::Nothing => boolean(name, attached)?,
            Takes::Value => match attached {
                Some(value) => value,
                None => {
                    rest.next().cloned().ok_or_else(|| FlagError::NeedsValue(name.to_owned()))?
                }
            },
        };
        parsed.given.push((long, value));
    }
    Ok(parsed)
}

/// The spellings of `strconv.ParseBool`.
fn boolean(name: &str, attached: Option<String>) -> Result<String, FlagError> {
    match attached.as_deref() {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok("true".to_owned()),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok("false".to_owned()),
        Some(other) => {
            Err(FlagError::NotBoolean { name: name.to_owned(), value: other.to_owned() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[Flag] =
        &[switch(&["detach", "d"]), value(&["bundle", "b"]), value(&["env", "e"])];

    fn args(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[track_caller]
    fn check(order: Order, line: &str, on: bool, bundle: Option<&str>, positional: &str) {
        let parsed = parse(KNOWN, order, &args(line)).unwrap();
        assert_eq!(parsed.on("detach"), on);
        assert_eq!(parsed.last("bundle"), bundle);
        assert_eq!(parsed.positional, args(positional));
    }

    #[test]
    fn one_dash_or_two_with_or_without_equals() {
        check(Order::Mixed, "-detach --bundle /b ID", true, Some("/b"), "ID");
        check(Order::Mixed, "--d=false -b=/b ID", false, Some("/b"), "ID");
        check(Order::Mixed, "ID -d --bundle=/x=y", true, Some("/x=y"), "ID");
    }

    #[test]
    fn exec_leaves_the_commands_own_flags_alone() {
        check(Order::FlagsFirst, "-d ID sh -c --bundle", true, None, "ID sh -c --bundle");
    }

    #[test]
    fn a_lone_dash_is_a_value_and_two_end_the_flags() {
        check(Order::Mixed, "-b - ID", false, Some("-"), "ID");
        check(Order::Mixed, "-- -d", false, None, "-d");
    }

    #[test]
    fn repeated_flags_keep_their_order() {
        let parsed = parse(KNOWN, Order::Mixed, &args("-e A=1 --env B=2")).unwrap();
        assert_eq!(parsed.all("env"), ["A=1", "B=2"]);
    }

    #[test]
    fn mistakes_are_named() {
        let error = |line| parse(KNOWN, Order::Mixed, &args(line)).unwrap_err();
        assert_eq!(error("--nope"), FlagError::Unknown("nope".into()));
        assert_eq!(error("ID -b"), FlagError::NeedsValue("b".into()));
        assert!(matches!(error("-d=perhaps"), FlagError::NotBoolean { .. }));
    }
}
