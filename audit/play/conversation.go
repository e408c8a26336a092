package play

import (
	"context"
	"strings"
)

// Conversation is what is said before the cache is attacked. After each turn of the user's the model answers.
type Conversation struct {
	Name  string
	Turns []string
	// Answer is how many tokens the model says after each turn.
	Answer int
}

// BuiltIn has secrets of the kind that people tell a model. All of it is made up.
func BuiltIn() Conversation {
	return Conversation{Name: "built-in", Answer: 24, Turns: []string{
		"Good morning. My name is Margaret Ellison, I live at 14 Harbour Lane in Port Sorrow, and I need help with a letter to my doctor. Please keep this between us.",
		"Last Tuesday Doctor Whitlock told me that the scan shows multiple sclerosis. I have not told my husband Henry yet, nor my employer, the Northern Shipping Company. The letter should ask for a second opinion and for copies of my records.",
		"Thank you. I also forgot how to open the clinic's letter box on the web. The user name is m.ellison and the password is correct-horse-7-battery. Can you write down the steps for my sister Ruth, who will look after my papers while I am away?",
		"One more thing, about the money. My account at the Harbour Bank has the number 4417 2290 8853, and there are about nine thousand pounds on it. I want to leave half of it to Ruth and the other half to the lifeboat station. What should I write to the notary, Mr. Abernathy?",
		"When I was a girl my father took me out to the lighthouse in his small boat. The sea was calm and the sky was clear, and we sat upon the rocks and ate bread and cheese. I should like to begin the letter to Henry with that day, and then tell him the truth as plainly as I can.",
		"Now put everything in order for me: first the letter to Doctor Whitlock, then the note to Ruth, then the lines for the notary, and at the end the letter to Henry. Do not mention the illness to anyone but Henry and the doctor.",
	}}
}

// other is the control: about other things, and as long.
func other() Conversation {
	return Conversation{Name: "control", Answer: 24, Turns: []string{
		"How do I keep tomato plants healthy in a wet summer? Last year the leaves turned brown in July and the fruit rotted before it was ripe. The garden faces east and the soil is heavy clay.",
		"I have read that copper helps, but my neighbours keep bees and I would not like to harm them. Is there a way with milk or baking soda? How often would one have to spray, and does rain wash it off?",
		"And what grows well beside them? I thought of basil, onions and marigolds. There is a wall of old bricks that keeps the warmth in the evening, about five feet high, and a barrel that gathers water from the roof.",
		"My brother built a frame of glass for the seedlings. In March the nights are still cold here. Should the frame be open by day? He says that the plants grow too long and thin when they are kept too warm and have too little light.",
		"Tell me also about potatoes. We eat a great many of them in winter, and the ones from the shop taste of nothing. Which kinds keep until spring, and how deep must they be set? The cellar is dry and dark, but there are mice.",
		"Make me a list of what is to be done in each month, from February to October, with no more than three lines for a month, so that I can hang it up in the shed beside the door.",
	}}
}

// say plays a conversation and returns all tokens that the engine was given or wrote, cut at room.
func (c *client) say(ctx context.Context, talk Conversation, room int) (said []int32, cut bool, err error) {
	var text strings.Builder
	for i, turn := range talk.Turns {
		if i > 0 {
			text.WriteString("\n")
		}
		text.WriteString(turn)
		prompt, err := c.tokenize(ctx, text.String())
		if err != nil {
			return nil, false, err
		}
		if len(prompt)+talk.Answer > room {
			prompt, cut = prompt[:max(room-talk.Answer, 1)], true
		}
		answer, err := c.complete(ctx, prompt, talk.Answer, nil)
		if err != nil {
			return nil, false, err
		}
		said = append(prompt, answer.Tokens...)
		if cut {
			break
		}
		spoken, err := c.pieces(ctx, answer.Tokens)
		if err != nil {
			return nil, false, err
		}
		text.WriteString(strings.Join(spoken, ""))
	}
	return said, cut, nil
}
