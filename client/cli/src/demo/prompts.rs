//! Prompts that share a long text: an inventory that is made up line by line, and a question about one of its lines.

const COLOURS: [&str; 7] = ["red", "blue", "green", "white", "amber", "grey", "violet"];
const THINGS: [&str; 9] = ["lamps", "bells", "maps", "ropes", "jars", "keys", "coils", "masks", "bricks"];
const PLACES: [&str; 5] =
    ["by the door", "under the stairs", "in the cellar", "on the roof", "near the well"];

pub(super) fn prompts(lines: u32, count: u32) -> Vec<String> {
    let inventory: String = (1..=lines).map(line).collect();
    let question = |i: u32| {
        let shelf = 1 + (i * 37) % lines;
        format!(
            "Inventory of the keeper:\n{inventory}\nQuestion: what is on shelf {shelf}?\nAnswer: Shelf {shelf} holds"
        )
    };
    (0..count).map(question).collect()
}

fn line(shelf: u32) -> String {
    let pick = |step: u32, words: &[&'static str]| words[(shelf * step) as usize % words.len()];
    let (colour, thing, place) = (pick(3, &COLOURS), pick(5, &THINGS), pick(7, &PLACES));
    format!("Shelf {shelf} holds {} {colour} {thing} {place}.\n", 2 + shelf * 11 % 17)
}
