// Prints a greedy completion of PROMPT, N tokens long, by node-llama-cpp on the CPU:
//
//     npm install node-llama-cpp
//     node complete.mjs MODEL PROMPT N [THREADS]
//
// One thread unless told: the demo model is too small to gain from more.
// Nothing in it knows of kvshield. Shielded:
//
//     kvshield run -- node complete.mjs MODEL PROMPT N
import {getLlama, LlamaCompletion, LlamaLogLevel} from "node-llama-cpp";

const [modelPath, prompt, ...numbers] = process.argv.slice(2);
const [maxTokens, threads = 1] = numbers.map(Number);
if (!(maxTokens >= 1 && threads >= 1)) {
    console.error("usage: node complete.mjs MODEL PROMPT N [THREADS]");
    process.exit(2);
}

const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: 1024, threads});
const completion = new LlamaCompletion({contextSequence: context.getSequence()});

console.log(await completion.generateCompletion(prompt, {maxTokens, temperature: 0}));
await llama.dispose();
