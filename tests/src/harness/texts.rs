//! Small deterministic texts in English, Chinese and Rust, varied enough that a model has something to learn.

use super::Random;

const SUBJECTS: [&str; 8] = [
    "The lighthouse keeper",
    "A young engineer",
    "The old river",
    "My neighbour",
    "The night train",
    "A careful reader",
    "The northern wind",
    "Her brother",
];
const VERBS: [&str; 8] = [
    "watched",
    "repaired",
    "remembered",
    "measured",
    "crossed",
    "described",
    "forgot",
    "carried",
];
const OBJECTS: [&str; 8] = [
    "the stone bridge",
    "a broken clock",
    "the long letter",
    "every star in the constellation",
    "the empty harbour",
    "a map of the coast",
    "the quiet garden",
    "the first snow",
];
const TIMES: [&str; 6] = [
    "before dawn",
    "for many years",
    "in the early spring",
    "without a word",
    "while the rain fell",
    "once again",
];

const PEOPLE: [&str; 8] = [
    "老船长",
    "年轻的工程师",
    "山里的孩子",
    "我的邻居",
    "图书管理员",
    "北方的旅客",
    "她的哥哥",
    "天文学家",
];
const ACTS: [&str; 8] = [
    "修好了",
    "记录了",
    "看见了",
    "忘记了",
    "描述了",
    "带走了",
    "测量了",
    "画出了",
];
const THINGS: [&str; 8] = [
    "旧钟",
    "一封长信",
    "天鹰座的星星",
    "空无一人的港口",
    "海岸的地图",
    "安静的花园",
    "初雪",
    "石桥",
];
const MOMENTS: [&str; 6] = [
    "天亮以前",
    "许多年来",
    "早春的时候",
    "一言不发地",
    "下雨的时候",
    "又一次",
];

const NAMES: [&str; 8] = [
    "lanes", "steps", "weights", "shards", "tokens", "losses", "ranks", "blocks",
];
const TYPES: [&str; 4] = ["u32", "u64", "f32", "usize"];
const FOLDS: [&str; 4] = ["sum", "max", "count", "last"];

/// Documents of a domain.
pub const DOCUMENTS: usize = 240;

fn english(random: &mut Random) -> String {
    let sentence = |random: &mut Random| {
        format!(
            "{} {} {} {}.",
            random.pick(&SUBJECTS),
            random.pick(&VERBS),
            random.pick(&OBJECTS),
            random.pick(&TIMES)
        )
    };
    let count = 1 + random.below(4);
    (0..count).map(|_| sentence(random)).collect::<Vec<_>>().join(" ")
}

fn chinese(random: &mut Random) -> String {
    let sentence = |random: &mut Random| {
        format!(
            "{}{}{}{}。",
            random.pick(&MOMENTS),
            random.pick(&PEOPLE),
            random.pick(&ACTS),
            random.pick(&THINGS)
        )
    };
    let count = 1 + random.below(5);
    (0..count).map(|_| sentence(random)).collect()
}

fn code(random: &mut Random) -> String {
    let (name, kind, fold) = (random.pick(&NAMES), random.pick(&TYPES), random.pick(&FOLDS));
    let bound = random.below(512);
    format!(
        "/// The {fold} of `{name}` from {bound} on.\nfn {fold}_of_{name}({name}: &[{kind}]) -> Option<{kind}> {{\n    \
         {name}.iter().skip({bound}).copied().{fold}()\n}}\n"
    )
}

/// The documents of each domain as JSON lines: file name, language, text.
#[must_use]
pub fn domains() -> [(&'static str, &'static str, String); 3] {
    let domain = |seed: u64, make: fn(&mut Random) -> String| -> String {
        let mut random = Random::new(seed);
        (0..DOCUMENTS)
            .map(|id| serde_json::json!({"id": id, "text": make(&mut random)}).to_string() + "\n")
            .collect()
    };
    [
        ("book-en", "en", domain(1, english)),
        ("wiki-zh", "zh", domain(2, chinese)),
        ("code", "code", domain(3, code)),
    ]
}
