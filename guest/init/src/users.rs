//! Who the payload runs as: names and numbers looked up in the image's own /etc/passwd and /etc/group.
//!
//! Own parser: a static glibc has no NSS, and the files are as untrusted as the image. Lines that do not parse are
//! skipped, as glibc does.

/// Longest passwd or group file that is read, bytes.
pub(crate) const MAX_TABLE: u64 = 1 << 20;
/// Most supplementary groups given to the payload.
const MAX_GROUPS: usize = 256;

/// The payload's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Groups beside `gid`, from the group file's member lists.
    pub(crate) groups: Vec<u32>,
    /// From the passwd file; empty: unknown.
    pub(crate) home: String,
}

impl User {
    /// PID 1's own.
    pub(crate) fn root() -> Self {
        Self {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            home: String::new(),
        }
    }

    /// Root and nothing else, as PID 1 is.
    pub(crate) fn is_plain_root(&self) -> bool {
        self.uid == 0 && self.gid == 0 && self.groups.is_empty()
    }
}

/// Why there is no such user.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum UserError {
    #[error("spec.user: {text:?} is not \"name\", \"uid\", \"name:group\" or \"uid:gid\"")]
    Form { text: String },
    #[error("spec.user: the image's /etc/passwd has no user {name:?}")]
    NoUser { name: String },
    #[error("spec.user: the image's /etc/group has no group {name:?}")]
    NoGroup { name: String },
}

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// Finds the user that `text` names; empty is root. A number need not be in the passwd file (its group is then 0, as
/// container engines do); a name must be.
///
/// # Errors
/// [`UserError`] names the field and what was looked for.
pub(crate) fn resolve(text: &str, passwd: &[u8], group: &[u8]) -> Result<User, UserError> {
    let (passwd, group) = (String::from_utf8_lossy(passwd), String::from_utf8_lossy(group));
    let (user_part, group_part) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (if text.is_empty() { "0" } else { text }, None),
    };
    if user_part.is_empty() || group_part.is_some_and(|part| part.is_empty() || part.contains(':')) {
        return Err(UserError::Form { text: text.into() });
    }
    let known = |wanted: &dyn Fn(&Passwd) -> bool| passwd.lines().filter_map(passwd_line).find(|line| wanted(line));
    let by_number = number(user_part);
    // A name that looks like a number is found as a name first.
    let entry = known(&|line| line.name == user_part).or_else(|| known(&|line| Some(line.uid) == by_number));
    let (uid, own_gid, name, home) = match (&entry, by_number) {
        (Some(line), _) => (line.uid, line.gid, Some(line.name), line.home),
        (None, Some(uid)) => (uid, 0, None, ""),
        (None, None) => return Err(UserError::NoUser { name: user_part.into() }),
    };
    let groups = || group.lines().filter_map(group_line);
    let gid = match group_part {
        None => own_gid,
        Some(part) => groups()
            .find(|line| line.name == part)
            .map(|line| line.gid)
            .or_else(|| number(part))
            .ok_or_else(|| UserError::NoGroup { name: part.into() })?,
    };
    let mut more: Vec<u32> = match (name, group_part) {
        // A group that was asked for stands alone.
        (Some(name), None) => groups()
            .filter(|line| line.gid != gid && line.members.split(',').any(|member| member == name))
            .map(|line| line.gid)
            .take(MAX_GROUPS)
            .collect(),
        _ => Vec::new(),
    };
    more.sort_unstable();
    more.dedup();
    Ok(User {
        uid,
        gid,
        groups: more,
        home: home.into(),
    })
}

fn passwd_line(line: &str) -> Option<Passwd<'_>> {
    let mut fields = line.split(':');
    let (name, _password) = (fields.next()?, fields.next()?);
    let (uid, gid) = (number(fields.next()?)?, number(fields.next()?)?);
    let (_gecos, home) = (fields.next()?, fields.next()?);
    (!name.is_empty()).then_some(Passwd {
        name,
        uid,
        gid,
        home: if home.starts_with('/') { home } else { "" },
    })
}

fn group_line(line: &str) -> Option<Group<'_>> {
    let mut fields = line.split(':');
    let (name, _password, gid) = (fields.next()?, fields.next()?, number(fields.next()?)?);
    (!name.is_empty()).then_some(Group {
        name,
        gid,
        members: fields.next().unwrap_or(""),
    })
}

/// A user or group number: digits only, and not `u32::MAX`, which the kernel reads as "leave it".
fn number(text: &str) -> Option<u32> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|&number| number != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\nbroken\nagent:x:1000:100:A:/home/agent:/bin/sh\n7:x:70:71::/seven:\nbad:x:-1:0::/:\nlast:x:4294967295:0::/:\n";
    const GROUP: &[u8] = b"root:x:0:\nusers:x:100:agent\naudio:x:29:other,agent\nvideo:x:44:agents\n";

    #[test]
    fn users_are_found_by_name_and_by_number() {
        let user = |uid, gid, groups: &[u32], home: &str| User {
            uid,
            gid,
            groups: groups.into(),
            home: home.into(),
        };
        for (why, text, expected) in [
            ("empty is root", "", user(0, 0, &[], "/root")),
            (
                "by name, with its groups",
                "agent",
                user(1000, 100, &[29], "/home/agent"),
            ),
            ("by number", "1000", user(1000, 100, &[29], "/home/agent")),
            ("unknown number", "4711", user(4711, 0, &[], "")),
            ("name and group", "agent:audio", user(1000, 29, &[], "/home/agent")),
            ("numbers", "5:6", user(5, 6, &[], "")),
            ("a name of digits is a name first", "7", user(70, 71, &[], "/seven")),
        ] {
            assert_eq!(resolve(text, PASSWD, GROUP), Ok(expected), "{why}");
        }
    }

    #[test]
    fn unknown_names_and_odd_forms_are_refused() {
        for text in [
            "nobody",
            ":",
            "agent:",
            ":users",
            "a:b:c",
            "agent:nogroup",
            "-1",
            "+5",
            "4294967295",
            "99999999999",
            "bad",
            "last",
        ] {
            assert!(resolve(text, PASSWD, GROUP).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn hostile_tables_never_panic(text in ".{0,20}", passwd in proptest::collection::vec(any::<u8>(), 0..300), group in "[a-z:,0-9\n]{0,200}") {
            if let Ok(user) = resolve(&text, &passwd, group.as_bytes()) {
                prop_assert!(user.uid != u32::MAX && user.gid != u32::MAX);
                prop_assert!(user.groups.len() <= MAX_GROUPS);
            }
        }
    }
}
