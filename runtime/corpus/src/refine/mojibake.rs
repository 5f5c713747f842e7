//! UTF-8 that was once read as Windows-1252 or Latin-1 and saved again ("â€™" for "’", "ä½ å¥½" for "你好") is turned back.
//!
//! Only where it can hardly be anything else, since the same letters stand side by side in honest French:
//! - `Ã` or `Â` before the character of a byte 80 to BF that makes a Latin-1 letter or sign;
//! - `â€` and a third character: general punctuation;
//! - `ðŸ` and two more: emoji;
//! - other characters of three bytes from U+2000 on, **two or more of them in a row**: one alone may be "é »".

/// `text` with such places turned back; none if there are none.
pub(super) fn repair(text: &str) -> Option<String> {
    // A place begins with one of these; most texts have none of them, and this search is the whole cost.
    let leads = |c: char| matches!(c, '\u{c2}' | '\u{c3}' | '\u{e2}'..='\u{ef}' | '\u{f0}');
    let first = text.find(leads)?;
    let mut repaired: Option<String> = None;
    let mut rest = &text[first..];
    let mut copied = 0;
    while let Some(at) = rest.find(leads) {
        rest = &rest[at..];
        let here = text.len() - rest.len();
        match place(rest) {
            Some((decoded, length)) => {
                let out = repaired.get_or_insert_with(|| String::with_capacity(text.len()));
                out.push_str(&text[copied..here]);
                out.push_str(&decoded);
                copied = here + length;
                rest = &text[copied..];
            }
            None => rest = &rest[rest.chars().next().map_or(1, char::len_utf8)..],
        }
    }
    repaired.map(|mut out| {
        out.push_str(&text[copied..]);
        out
    })
}

/// What the beginning of `text` was, and its length in bytes as it stands.
fn place(text: &str) -> Option<(String, usize)> {
    let (c, length) = decode(text)?;
    if c < '\u{100}' || matches!(c, '\u{2000}'..='\u{203f}') || c >= '\u{1f000}' {
        return Some((c.to_string(), length));
    }
    let mut decoded = c.to_string();
    let mut total = length;
    while let Some((c, length)) = decode(&text[total..]) {
        decoded.push(c);
        total += length;
    }
    (decoded.chars().nth(1).is_some()).then_some((decoded, total))
}

/// The character whose UTF-8 bytes the first characters of `text` are, in the ranges that are turned back.
fn decode(text: &str) -> Option<(char, usize)> {
    let mut chars = text.char_indices();
    let lead = byte(chars.next()?.1)?;
    let count = match lead {
        0xc2 | 0xc3 => 2,
        0xe2..=0xef => 3,
        0xf0 => 4,
        _ => return None,
    };
    let mut bytes = [lead, 0, 0, 0];
    for slot in &mut bytes[1..count] {
        *slot = byte(chars.next()?.1)?;
    }
    let length = chars.next().map_or(text.len(), |(at, _)| at);
    let c = std::str::from_utf8(&bytes[..count]).ok()?.chars().next()?;
    let known = matches!(c, '\u{a0}'..='\u{ff}' | '\u{2000}'..='\u{ffff}' | '\u{1f000}'..='\u{1faff}');
    known.then_some((c, length))
}

/// The byte that Windows-1252 reads as this character, or Latin-1 where that leaves it out; none below 80.
const fn byte(c: char) -> Option<u8> {
    let byte = match c {
        '\u{80}'..='\u{ff}' => c as u32 as u8,
        '€' => 0x80,
        '‚' => 0x82,
        'ƒ' => 0x83,
        '„' => 0x84,
        '…' => 0x85,
        '†' => 0x86,
        '‡' => 0x87,
        'ˆ' => 0x88,
        '‰' => 0x89,
        'Š' => 0x8a,
        '‹' => 0x8b,
        'Œ' => 0x8c,
        'Ž' => 0x8e,
        '‘' => 0x91,
        '’' => 0x92,
        '“' => 0x93,
        '”' => 0x94,
        '•' => 0x95,
        '–' => 0x96,
        '—' => 0x97,
        '˜' => 0x98,
        '™' => 0x99,
        'š' => 0x9a,
        '›' => 0x9b,
        'œ' => 0x9c,
        'ž' => 0x9e,
        'Ÿ' => 0x9f,
        _ => return None,
    };
    Some(byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `text` as someone who takes UTF-8 for Windows-1252 (or for Latin-1) sees it.
    fn misread(text: &str, latin1: bool) -> String {
        let read = |b: u8| {
            let specials = (0x80_u32..0x2123).filter_map(char::from_u32);
            let special = (0x80..0xa0).contains(&b) && !latin1;
            special
                .then(|| specials.into_iter().find(|&c| c > '\u{ff}' && byte(c) == Some(b)))
                .flatten()
                .unwrap_or(char::from(b))
        };
        text.bytes().map(read).collect()
    }

    #[test]
    fn misread_text_is_turned_back() {
        for text in [
            "It’s a “quoted” word – and a café, 20 °C.",
            "你好,世界。这是一个测试。",
            "naïve façade; Ünïcödé",
            "emoji 😀 here",
            "mixed 中文字 and ’ more",
        ] {
            for latin1 in [false, true] {
                let bad = misread(text, latin1);
                assert_ne!(bad, text);
                assert_eq!(repair(&bad).as_deref(), Some(text), "{bad}");
            }
        }
    }

    #[test]
    fn honest_text_is_left_alone() {
        for text in [
            "plain ASCII",
            "Il fut blessé\u{a0}», dit le père…» après l'été\u{a0}?",
            "Ångström, São Paulo, VOILÀ… CAFÉ… «\u{a0}à\u{a0}»",
            "你好,世界。",
            "price: 5 €™",
        ] {
            assert_eq!(repair(text), None, "{text}");
        }
    }

    proptest! {
        /// Nothing breaks on any text, and ASCII around a place stays.
        #[test]
        fn any_text_is_survived(text in "\\PC*", before in "[a-z ]{0,9}", after in "[a-z ]{0,9}") {
            let _ = repair(&text);
            let bad = format!("{before}{}{after}", misread("’", false));
            prop_assert_eq!(repair(&bad), Some(format!("{before}’{after}")));
        }
    }
}
