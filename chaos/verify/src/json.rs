//! JSON as the run writes it: order of keys and text of numbers are part of what is checked, so both are kept.
//!
//! - Numbers stay text until somebody asks for a value; a float is then the nearest double, never an approximation.
//! - A key that stands twice, a number with a leading zero, anything behind the value: refused.
//! - Nesting and length are bounded: a hostile file costs an error, not the stack.

/// Deepest nesting; the deepest document of a run (`data.json`) has five levels.
const NESTING_MAX: usize = 32;

#[derive(Clone, PartialEq, Debug)]
pub enum Json {
    Null,
    Bool(bool),
    /// The number's text.
    Number(String),
    Text(String),
    List(Vec<Json>),
    /// Keys in file order.
    Object(Vec<(String, Json)>),
}

impl Json {
    /// Reads one value with nothing but white space around it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut reader = Reader { bytes, at: 0 };
        let value = reader.value(0)?;
        reader.space();
        if reader.at == bytes.len() {
            Ok(value)
        } else {
            Err(format!("something stands behind the value, at byte {}", reader.at))
        }
    }

    /// The value in its shortest form: no white space, escapes only where JSON demands them.
    pub fn print(&self) -> String {
        let mut out = String::new();
        self.print_into(&mut out);
        out
    }

    fn print_into(&self, out: &mut String) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Self::Number(text) => out.push_str(text),
            Self::Text(text) => print_text(text, out),
            Self::List(items) => {
                out.push('[');
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        out.push(',');
                    }
                    item.print_into(out);
                }
                out.push(']');
            }
            Self::Object(fields) => {
                out.push('{');
                for (index, (key, value)) in fields.iter().enumerate() {
                    if index > 0 {
                        out.push(',');
                    }
                    print_text(key, out);
                    out.push(':');
                    value.print_into(out);
                }
                out.push('}');
            }
        }
    }

    /// The values of an object that has exactly these keys, in this order.
    pub fn exactly<const N: usize>(&self, keys: [&str; N]) -> Result<[&Self; N], String> {
        let fields = self.object()?;
        let found: Vec<&str> = fields.iter().map(|(key, _)| key.as_str()).collect();
        if found != keys {
            return Err(format!("its keys are [{}], not [{}]", found.join(" "), keys.join(" ")));
        }
        Ok(std::array::from_fn(|index| &fields[index].1))
    }

    pub fn get(&self, key: &str) -> Result<&Self, String> {
        let found = self.object()?.iter().find(|(name, _)| name == key);
        found
            .map(|(_, value)| value)
            .ok_or_else(|| format!("'{key}' is missing"))
    }

    pub fn object(&self) -> Result<&[(String, Self)], String> {
        match self {
            Self::Object(fields) => Ok(fields),
            other => Err(format!("{} where an object must stand", other.kind())),
        }
    }

    pub fn list(&self) -> Result<&[Self], String> {
        match self {
            Self::List(items) => Ok(items),
            other => Err(format!("{} where a list must stand", other.kind())),
        }
    }

    pub fn text(&self) -> Result<&str, String> {
        match self {
            Self::Text(text) => Ok(text),
            other => Err(format!("{} where text must stand", other.kind())),
        }
    }

    /// A whole number from 0 up.
    pub fn count(&self) -> Result<u64, String> {
        match self {
            Self::Number(text) => text
                .parse()
                .map_err(|_| format!("{text} is no whole number below 2^64")),
            other => Err(format!("{} where a number must stand", other.kind())),
        }
    }

    /// The nearest double. The text must be the shortest that reads back to it: one value, one spelling.
    pub fn float(&self) -> Result<f64, String> {
        let Self::Number(text) = self else {
            return Err(format!("{} where a number must stand", self.kind()));
        };
        let value: f64 = text.parse().map_err(|_| format!("{text} is no number"))?;
        if !value.is_finite() {
            return Err(format!("{text} is beyond any double"));
        }
        let fraction = text
            .split(['e', 'E'])
            .next()
            .and_then(|mantissa| mantissa.split_once('.'));
        let padded = fraction.is_some_and(|(_, digits)| digits.len() > 1 && digits.ends_with('0'));
        if padded || significant_digits(text) != significant_digits(&format!("{value:e}")) {
            return Err(format!("{text} is not the shortest text of its value, {value:e}"));
        }
        Ok(value)
    }

    /// The bytes of a text of `N * 2` lower-case hex digits.
    pub fn hex<const N: usize>(&self) -> Result<[u8; N], String> {
        from_hex(self.text()?)
    }

    const fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a truth value",
            Self::Number(_) => "a number",
            Self::Text(_) => "text",
            Self::List(_) => "a list",
            Self::Object(_) => "an object",
        }
    }
}

/// The digits of a number without sign, point, exponent and the zeros around them.
fn significant_digits(text: &str) -> String {
    let mantissa = text.split(['e', 'E']).next().unwrap_or_default();
    let digits: String = mantissa.chars().filter(char::is_ascii_digit).collect();
    digits.trim_matches('0').to_owned()
}

pub fn from_hex<const N: usize>(text: &str) -> Result<[u8; N], String> {
    let wrong = || format!("'{text}' is not {} lower-case hex digits", N * 2);
    let digits = text.as_bytes();
    if digits.len() != N * 2 {
        return Err(wrong());
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        for digit in pair {
            let value = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                _ => return Err(wrong()),
            };
            *byte = *byte << 4 | value;
        }
    }
    Ok(bytes)
}

pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn print_text(text: &str, out: &mut String) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\t' => out.push_str("\\t"),
            '\n' => out.push_str("\\n"),
            '\u{c}' => out.push_str("\\f"),
            '\r' => out.push_str("\\r"),
            control if control < ' ' => out.push_str(&format!("\\u{:04x}", u32::from(control))),
            plain => out.push(plain),
        }
    }
    out.push('"');
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn fail<T>(&self, what: &str) -> Result<T, String> {
        Err(format!("not JSON at byte {}: {what}", self.at))
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn expect(&mut self, text: &str) -> Result<(), String> {
        if self.bytes[self.at..].starts_with(text.as_bytes()) {
            self.at += text.len();
            return Ok(());
        }
        self.fail(&format!("'{text}' must stand here"))
    }

    fn value(&mut self, depth: usize) -> Result<Json, String> {
        if depth > NESTING_MAX {
            return self.fail("nested too deep");
        }
        self.space();
        match self.peek() {
            Some(b'{') => self.members(depth),
            Some(b'[') => self.items(depth),
            Some(b'"') => self.string().map(Json::Text),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b't') => self.expect("true").map(|()| Json::Bool(true)),
            Some(b'f') => self.expect("false").map(|()| Json::Bool(false)),
            Some(b'n') => self.expect("null").map(|()| Json::Null),
            _ => self.fail("a value must stand here"),
        }
    }

    /// After one element: whether another follows; `close` ends the list or object.
    fn another(&mut self, close: u8) -> Result<bool, String> {
        self.space();
        match self.peek() {
            Some(b',') => {
                self.at += 1;
                Ok(true)
            }
            Some(byte) if byte == close => {
                self.at += 1;
                Ok(false)
            }
            _ => self.fail("a comma or the end must stand here"),
        }
    }

    fn is_empty(&mut self, close: u8) -> bool {
        self.at += 1;
        self.space();
        let empty = self.peek() == Some(close);
        self.at += usize::from(empty);
        empty
    }

    fn items(&mut self, depth: usize) -> Result<Json, String> {
        let mut items = Vec::new();
        if !self.is_empty(b']') {
            loop {
                items.push(self.value(depth + 1)?);
                if !self.another(b']')? {
                    break;
                }
            }
        }
        Ok(Json::List(items))
    }

    fn members(&mut self, depth: usize) -> Result<Json, String> {
        let mut fields = Vec::new();
        let mut seen = std::collections::HashSet::new();
        if !self.is_empty(b'}') {
            loop {
                self.space();
                let key = self.string()?;
                if !seen.insert(key.clone()) {
                    return self.fail(&format!("the key '{key}' stands twice"));
                }
                self.space();
                self.expect(":")?;
                fields.push((key, self.value(depth + 1)?));
                if !self.another(b'}')? {
                    break;
                }
            }
        }
        Ok(Json::Object(fields))
    }

    fn digits(&mut self) -> Result<(), String> {
        let from = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        if self.at == from {
            self.fail("a digit must stand here")
        } else {
            Ok(())
        }
    }

    fn number(&mut self) -> Result<Json, String> {
        let from = self.at;
        self.at += usize::from(self.peek() == Some(b'-'));
        let zero = self.peek() == Some(b'0');
        let first = self.at;
        self.digits()?;
        if zero && self.at > first + 1 {
            return self.fail("a number begins with a needless zero");
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            self.at += usize::from(matches!(self.peek(), Some(b'+' | b'-')));
            self.digits()?;
        }
        let text = String::from_utf8_lossy(&self.bytes[from..self.at]).into_owned();
        Ok(Json::Number(text))
    }

    fn string(&mut self) -> Result<String, String> {
        self.expect("\"")?;
        let mut text = String::new();
        loop {
            let from = self.at;
            while self
                .peek()
                .is_some_and(|byte| byte != b'"' && byte != b'\\' && byte >= b' ')
            {
                self.at += 1;
            }
            match std::str::from_utf8(&self.bytes[from..self.at]) {
                Ok(part) => text.push_str(part),
                Err(_) => return self.fail("text that is not UTF-8"),
            }
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(text);
                }
                Some(b'\\') => {
                    self.at += 1;
                    text.push(self.escape()?);
                }
                _ => return self.fail("text breaks off"),
            }
        }
    }

    fn escape(&mut self) -> Result<char, String> {
        let code = self.peek();
        self.at += 1;
        Ok(match code {
            Some(plain @ (b'"' | b'\\' | b'/')) => char::from(plain),
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => {
                let high = self.unit()?;
                if (0xd800..0xdc00).contains(&high) {
                    self.expect("\\u")?;
                    let low = self.unit()?;
                    let pair = [high as u16, low as u16];
                    return match char::decode_utf16(pair).next() {
                        Some(Ok(character)) if (0xdc00..0xe000).contains(&low) => Ok(character),
                        _ => self.fail("half a surrogate pair"),
                    };
                }
                match char::from_u32(high) {
                    Some(character) => character,
                    None => return self.fail("half a surrogate pair"),
                }
            }
            _ => return self.fail("an unknown escape"),
        })
    }

    fn unit(&mut self) -> Result<u32, String> {
        let digits = self.bytes.get(self.at..self.at + 4);
        let digits = digits.filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        let value = digits.and_then(|digits| u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        match value {
            Some(value) => {
                self.at += 4;
                Ok(value)
            }
            None => self.fail("four hex digits must stand here"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_prints_as_it_was() {
        let text = r#"{"b":[1,-0.5,1e-7,{}],"a":"q\"\\\n\u001f é 漢","c":null,"d":[true,false,[]]}"#;
        assert_eq!(Json::parse(text.as_bytes()).unwrap().print(), text);
        let spaced = Json::parse(b" { \"a\" : [ 1 , 2 ] } \n").unwrap();
        assert_eq!(spaced.print(), r#"{"a":[1,2]}"#);
        assert_eq!(
            Json::parse(br#""\ud83d\ude00\u00e9""#).unwrap(),
            Json::Text("😀é".into())
        );
    }

    #[test]
    fn what_is_no_json_is_refused() {
        let deep = "[".repeat(100);
        for bad in [
            "",
            "{",
            "[1,]",
            "{\"a\":1,\"a\":2}",
            "01",
            "1.",
            "1e",
            "-",
            "nul",
            "\"a",
            "\"\\x\"",
            "\"\\ud800\"",
            "1 2",
            "\"\n\"",
            &deep,
        ] {
            assert!(Json::parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(Json::parse(b"\"\xff\"").is_err());
    }

    #[test]
    fn a_float_has_one_spelling() {
        let float = |text: &str| Json::Number(text.into()).float();
        for (text, value) in [
            ("0.1", 0.1),
            ("0.0", 0.0),
            ("100.0", 100.0),
            ("1e-7", 1e-7),
            ("5e-324", 5e-324),
            ("0.00001", 1e-5),
        ] {
            assert_eq!(float(text), Ok(value));
        }
        assert!(
            float("0.10000000000000001").is_err(),
            "reads back, but is not the shortest"
        );
        assert!(float("0.10").is_err() && float("1e999").is_err());
        assert!(Json::Number("1.5".into()).count().is_err());
    }

    #[test]
    fn keys_stand_in_their_order() {
        let object = Json::parse(br#"{"a":1,"b":2}"#).unwrap();
        assert!(object.exactly(["a", "b"]).is_ok());
        assert!(object.exactly(["b", "a"]).is_err());
        assert!(object.exactly(["a"]).is_err());
        assert_eq!(from_hex::<2>("0aff"), Ok([10, 255]));
        assert!(from_hex::<2>("0AFF").is_err() && from_hex::<2>("0af").is_err());
    }
}
