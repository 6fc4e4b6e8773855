// Tasks that the bundled demo model was trained for; any Flan model can try them.

export const EXAMPLES = [
  {
    name: "Last letters",
    mode: "cot",
    instruction: "Take the last letters of Paul Maria and join them.",
  },
  {
    name: "Coin flip",
    mode: "cot",
    instruction:
      "A coin is heads up. Evan does not flip the coin. Don flips the coin. Karl does not flip the coin. Is the coin still heads up?",
  },
  {
    name: "Sentiment",
    mode: "instruction",
    instruction: "Is this review positive or negative?",
    input: "I loved the story, it was charming.",
    options: ["positive", "negative"],
  },
  {
    name: "Question type",
    mode: "few_shot",
    instruction: "Which category does the question belong to?",
    input: "Who opened the window?",
    exemplars: [
      { input: "Where do cows live?", output: "place" },
      { input: "When did the baker call?", output: "time" },
    ],
  },
  {
    name: "Odd one out",
    mode: "instruction",
    instruction: "Find the odd one out.",
    input: "lemonade, spinach, garlic, broccoli",
  },
  { name: "Addition", mode: "cot", instruction: "What is 34 + 25?" },
  {
    name: "Vote on a sum",
    mode: "cot",
    instruction: "What is 26 + 31?",
    settings: { samples: 12, temperature: 0.9, seed: 3 },
  },
  { name: "Raw prompt", mode: "raw", instruction: "How many words are in the list? north, cotton, lemon, ice" },
];
