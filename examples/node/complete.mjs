// Prints a greedy completion of PROMPT, N tokens long, by node-llama-cpp on the CPU:
//
//     npm install node-llama-cpp
//     node complete.mjs MODEL PROMPT N
//
// Nothing in it knows of kvshield. Shielded:
//
//     kvshield run -- node complete.mjs MODEL PROMPT N
import {availableParallelism} from "node:os";
import {getLlama, LlamaCompletion, LlamaLogLevel} from "node-llama-cpp";

const [modelPath, prompt, tokens] = process.argv.slice(2);
const maxTokens = Number(tokens);
if (!Number.isInteger(maxTokens) || maxTokens < 1) {
    console.error("usage: node complete.mjs MODEL PROMPT N");
    process.exit(2);
}

const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath});
// More threads than cores wait for each other most of the time.
const context = await model.createContext({contextSize: 1024, threads: availableParallelism()});
const completion = new LlamaCompletion({contextSequence: context.getSequence()});

console.log(await completion.generateCompletion(prompt, {maxTokens, temperature: 0}));
await llama.dispose();
