//! The little JSON that Flintlock's guest-agent protocol needs. Own parser: the requests are small, and a library would be a
//! tenth of this program.

/// A value; objects keep their order, and the last of equal keys counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    Number(i64),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(String, Json)>),
}

/// Deepest nesting: the protocol needs three.
const MAX_DEPTH: usize = 8;

impl Json {
    /// The whole of `bytes` as one value; `None`: not JSON, or a number with a fraction.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let mut parser = Parser {
            text: std::str::from_utf8(bytes).ok()?,
        };
        let value = parser.value(MAX_DEPTH)?;
        parser.blank();
        parser.text.is_empty().then_some(value)
    }

    /// The member of an object; missing is null.
    pub(crate) fn get(&self, key: &str) -> &Self {
        match self {
            Self::Object(members) => members
                .iter()
                .rev()
                .find(|(name, _)| name == key)
                .map_or(&Self::Null, |(_, v)| v),
            _ => &Self::Null,
        }
    }
}

struct Parser<'a> {
    text: &'a str,
}

impl Parser<'_> {
    fn blank(&mut self) {
        self.text = self.text.trim_start_matches([' ', '\t', '\n', '\r']);
    }

    fn eat(&mut self, word: &str) -> Option<()> {
        self.text = self.text.strip_prefix(word)?;
        Some(())
    }

    fn value(&mut self, depth: usize) -> Option<Json> {
        let depth = depth.checked_sub(1)?;
        self.blank();
        match self.text.bytes().next()? {
            b'n' => self.eat("null").map(|()| Json::Null),
            b't' => self.eat("true").map(|()| Json::Bool(true)),
            b'f' => self.eat("false").map(|()| Json::Bool(false)),
            b'"' => self.string().map(Json::Text),
            b'[' => self.sequence('[', ']', |parser| parser.value(depth)).map(Json::List),
            b'{' => self
                .sequence('{', '}', |parser| {
                    parser.blank();
                    let name = parser.string()?;
                    parser.blank();
                    parser.eat(":")?;
                    Some((name, parser.value(depth)?))
                })
                .map(Json::Object),
            _ => {
                let end = self
                    .text
                    .find(|c: char| !c.is_ascii_digit() && c != '-')
                    .unwrap_or(self.text.len());
                let (number, rest) = self.text.split_at(end);
                self.text = rest;
                number.parse().ok().map(Json::Number)
            }
        }
    }

    fn sequence<T>(&mut self, open: char, close: char, mut item: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        self.text = self.text.strip_prefix(open)?;
        let mut items = Vec::new();
        self.blank();
        if let Some(rest) = self.text.strip_prefix(close) {
            self.text = rest;
            return Some(items);
        }
        loop {
            items.push(item(self)?);
            self.blank();
            if let Some(rest) = self.text.strip_prefix(close) {
                self.text = rest;
                return Some(items);
            }
            self.eat(",")?;
        }
    }

    fn string(&mut self) -> Option<String> {
        self.eat("\"")?;
        let mut out = String::new();
        loop {
            let at = self.text.find(|c: char| c == '"' || c == '\\' || c < ' ')?;
            out.push_str(&self.text[..at]);
            self.text = &self.text[at..];
            if self.eat("\"").is_some() {
                return Some(out);
            }
            self.eat("\\")?;
            let escape = self.text.chars().next()?;
            self.text = &self.text[escape.len_utf8()..];
            out.push(match escape {
                '"' | '\\' | '/' => escape,
                'b' => '\u{8}',
                'f' => '\u{c}',
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                'u' => self.unicode()?,
                _ => return None,
            });
        }
    }

    /// Four digits, or two times four for characters beyond 16 bits; half a pair becomes U+FFFD.
    fn unicode(&mut self) -> Option<char> {
        let first = self.four()?;
        if !(0xd800..0xdc00).contains(&first) {
            return Some(char::from_u32(first).unwrap_or(char::REPLACEMENT_CHARACTER));
        }
        let before = self.text;
        if self.eat("\\u").is_some()
            && let Some(second @ 0xdc00..0xe000) = self.four()
        {
            return char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00));
        }
        self.text = before;
        Some(char::REPLACEMENT_CHARACTER)
    }

    fn four(&mut self) -> Option<u32> {
        let digits = self
            .text
            .get(..4)
            .filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))?;
        self.text = &self.text[4..];
        u32::from_str_radix(digits, 16).ok()
    }
}

/// `text` as a JSON string.
pub(crate) fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            // Others below space are as good as a space in a message for people.
            c if c < ' ' => out.push(' '),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_are_read_as_json_says() {
        let text = r#" {"a":[1,-2,{}],"b":"\u00e4\n\"\\\ud83d\ude00\ud83d","c":null,"d":true,"a":[false]} "#;
        let json = Json::parse(text.as_bytes()).unwrap();
        assert_eq!(
            json.get("a"),
            &Json::List(vec![Json::Bool(false)]),
            "the last of equal keys counts"
        );
        assert_eq!(json.get("b"), &Json::Text("ä\n\"\\😀\u{fffd}".into()));
        assert_eq!((json.get("c"), json.get("none")), (&Json::Null, &Json::Null));
        for bad in [
            "",
            "{",
            "[1,]",
            "{\"a\"}",
            "1.5",
            "tru",
            "\"\n\"",
            "\"\\x\"",
            "[] []",
            "{\"a\":1,}",
            "-",
            "[[[[[[[[[1]]]]]]]]]",
        ] {
            assert_eq!(Json::parse(bad.as_bytes()), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_string_comes_back(text in "\\PC*") {
            prop_assert_eq!(Json::parse(quoted(&text).as_bytes()), Some(Json::Text(text)));
        }

        #[test]
        fn nonsense_never_panics(text in "[\\[\\]{}\",:0-9a-z\\\\u -]{0,60}") {
            let _ = Json::parse(text.as_bytes());
        }
    }
}
