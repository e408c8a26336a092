// Prints greedy completions of PROMPTs, N tokens long, by node-llama-cpp with an F32 cache, as JSON in llama-server's words, with NEAREST
// probabilities for each token and all for the first: LIBRARY MODEL N NEAREST PROMPT…
const [library, modelPath, n, nearest, ...prompts] = process.argv.slice(2);
const {getLlama, LlamaLogLevel} = await import(library);

const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
    contextSize: 1024, threads: 1, flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
});
const sequence = context.getSequence();

// The library gives them in falling order.
const list = (probabilities, n) => ({
    top_logprobs: [...probabilities].slice(0, n).map(([id, p]) => ({id, logprob: Math.log(p)}))
});

async function complete(prompt) {
    await sequence.clearHistory();
    const start = [model.tokens.bos, ...model.tokenize(prompt)];
    const text = {tokens: [], completion_probabilities: []};
    let first;
    for await (const {token, probabilities} of sequence.evaluateWithMetadata(start, {probabilities: true}, {temperature: 0, yieldEogToken: true})) {
        first ??= {tokens: [token], completion_probabilities: [list(probabilities)]};
        text.tokens.push(token);
        text.completion_probabilities.push(list(probabilities, Number(nearest)));
        if (text.tokens.length == Number(n))
            break;
    }
    return {...text, content: model.detokenize(text.tokens), first};
}

for (const prompt of prompts)
    console.log(JSON.stringify(await complete(prompt)));
await llama.dispose();
