"""Answers that are written out: why and how, advice, small requests, talk, opinions, and what nobody can know.

Keys are the ways to ask, separated by bars. All of it was written for these lessons.
"""

from __future__ import annotations

EXPLANATIONS = {
    "Why do leaves fall in autumn? | Why do trees lose their leaves?": (
        "Leaves lose much water, and in cold weather a tree cannot get enough of it, so it lets them go."
    ),
    "Why is the sea salty? | Where does the salt in the sea come from?": (
        "Rivers wash salt out of rocks and carry it to the sea. The water leaves as vapour, and the salt stays."
    ),
    "How do bees make honey? | Where does honey come from?": (
        "Bees collect nectar from flowers, carry it to the hive and fan it with their wings until it is thick."
    ),
    "Why do we sleep? | What is sleep good for?": (
        "While we sleep the body repairs itself and the brain sorts what it has learned."
    ),
    "What is thunder? | Why does thunder follow lightning?": (
        "Lightning heats the air so quickly that it bursts outwards, and that bang is thunder."
    ),
    "How do fish breathe? | Can fish breathe under water?": (
        "Fish let water flow over their gills, which take the oxygen out of it."
    ),
    "Why do cats purr? | What does it mean when a cat purrs?": (
        "Cats mostly purr when they are content, and sometimes to calm themselves when they are hurt."
    ),
    "How does a bicycle stay upright? | Why does a moving bicycle not fall over?": (
        "The rider steers a little into every fall, so the wheels always come back under the weight."
    ),
    "What is a volcano? | Tell me what a volcano is.": (
        "A volcano is an opening in the ground through which melted rock, ash and gas come out."
    ),
    "How does a refrigerator work? | How does a fridge keep food cold?": (
        "A liquid takes up heat inside as it turns to gas, and a pump drives that heat out at the back."
    ),
    "Why does ice float? | Why does ice stay on top of water?": (
        "Water grows as it freezes, so ice is lighter than the same amount of water."
    ),
    "What makes the tides? | Why does the sea rise and fall?": (
        "The Moon pulls on the oceans, and as the Earth turns, the raised water passes each coast twice a day."
    ),
    "How do plants eat? | What do plants live on?": (
        "Plants make sugar out of sunlight, air and water, and take minerals from the soil."
    ),
    "Why do we yawn? | What is yawning for?": (
        "Nobody is quite sure, but yawning may cool the brain and wake us up a little."
    ),
    "What is a rainbow? | How is a rainbow made?": (
        "Drops of rain bend sunlight and split it, so that each colour reaches us from its own angle."
    ),
    "How does soap clean? | Why does soap take away grease?": (
        "One end of soap holds on to grease and the other to water, so the water carries the dirt away."
    ),
    "Why do onions make us cry? | Why do my eyes water when I cut onions?": (
        "A cut onion gives off a gas that stings the eyes, and tears wash it out."
    ),
    "What is a desert? | Explain what a desert is.": ("A desert is a land with so little rain that few plants grow."),
    "How do birds fly? | What keeps a bird in the air?": (
        "Wings push air down as they beat, and the air pushes the bird up in return."
    ),
    "Why does bread rise? | What does yeast do in dough?": (
        "Yeast eats sugar in the dough and gives off bubbles of gas that blow it up."
    ),
    "What is a shadow? | Where do shadows come from?": (
        "A shadow is the dark place behind something that stands in the way of light."
    ),
    "How does a magnet work? | Why do magnets pull on iron?": (
        "Tiny magnets inside it all point the same way, and together they pull on iron."
    ),
    "Why do stars twinkle? | Why do the stars seem to flicker?": (
        "Moving air bends their light a little to and fro before it reaches our eyes."
    ),
    "What is an echo? | Why do I hear an echo in the mountains?": (
        "An echo is a sound that comes back to you from a wall or a cliff."
    ),
    "How does a clock keep time? | What makes a clock tick?": (
        "Something in it swings at an even pace, and wheels or a chip count the swings."
    ),
    "Why do bears sleep in winter? | What is hibernation?": (
        "There is little to eat in winter, so bears live slowly on their fat until spring."
    ),
    "What is the moon? | Tell me about the Moon.": (
        "The Moon is a ball of rock that goes round the Earth about once a month."
    ),
    "How do vaccines work? | What does a vaccine do?": (
        "A vaccine shows the body a harmless part of a germ, so that it knows the real one later."
    ),
    "Why does metal feel cold? | Why is a metal spoon colder than a wooden one?": (
        "Metal leads the heat of your hand away quickly, so it feels colder than wood."
    ),
    "What is a computer program? | What is software?": (
        "A program is a list of steps that a computer carries out one after another."
    ),
    "How does a plane stay up? | Why do aeroplanes not fall down?": (
        "Its wings turn the rushing air downwards, and that holds the plane up."
    ),
    "What causes the seasons? | Why is it warmer in summer?": (
        "The Earth's axis is tilted, so each half gets more sun for one part of the year."
    ),
}

ADVICE = {
    "How do I boil an egg? | How long should I boil an egg?": (
        "Put it into boiling water, wait six minutes for a soft one or ten for a hard one, then cool it."
    ),
    "How can I sleep better? | What helps against bad sleep?": (
        "Go to bed at the same hour, keep the room dark and cool, and leave your phone outside."
    ),
    "How do I make tea? | What is the right way to make tea?": (
        "Pour hot water over the leaves, wait three minutes, and take the leaves out."
    ),
    "How can I save money? | Give me a tip for saving money.": (
        "Write down what you spend for a month, then drop what you would not miss."
    ),
    "How do I remove a coffee stain? | How do I get coffee out of a shirt?": (
        "Rinse it with cold water at once, rub in a little soap, and wash it as usual."
    ),
    "How do I train my dog? | How can I teach my dog to sit?": (
        "Reward your dog at once when it does right, and practise a few minutes each day."
    ),
    "How can I remember names? | I always forget names. What can I do?": (
        "Say the name aloud when you hear it, and picture it together with the face."
    ),
    "How do I grow tomatoes? | What do tomatoes need to grow?": (
        "Give them a sunny place and water at the roots, and tie them to a stick."
    ),
    "How do I fix a flat tyre? | My bicycle has a flat tyre. What now?": (
        "Take out the tube, find the hole, clean it, glue a patch on it and pump it up again."
    ),
    "How do I start running? | How can I begin to jog?": (
        "Start slowly with ten minutes, walk when you must, and add a little each week."
    ),
    "How do I write a good letter? | Give me advice for writing letters.": (
        "Say first what you want, use short sentences, and read it aloud before you send it."
    ),
    "How do I calm down? | What can I do when I am nervous?": (
        "Breathe in slowly, breathe out even more slowly, and count to ten."
    ),
    "How do I cook rice? | What is an easy way to cook rice?": (
        "Take two cups of water for one of rice, let it simmer with the lid on, and do not stir."
    ),
    "How can I study for a test? | What is the best way to study?": (
        "Study a little each day, and ask yourself questions instead of reading the same page again."
    ),
    "How do I choose a good melon? | How do I know that a melon is ripe?": (
        "Take one that is heavy for its size and smells sweet."
    ),
    "What should I wear in winter? | How do I stay warm in the snow?": (
        "Wear several thin layers, a hat and gloves, and keep your feet dry."
    ),
}

REQUESTS = {
    "Tell me something about elephants. | What do you know about elephants?": (
        "Elephants are the largest animals on land, and they live in families led by an old female."
    ),
    "Tell me something about penguins. | What do you know about penguins?": (
        "Penguins are birds that cannot fly but swim very well, and most live in the cold south."
    ),
    "Tell me something about trains. | Say something about trains.": (
        "Trains run on steel rails, which lets one engine pull a great load."
    ),
    "Tell me something about the Romans. | Who were the Romans?": (
        "The Romans ruled much of Europe for centuries and built long straight roads."
    ),
    "Tell me a very short story about a fox. | Write a tiny story about a fox.": (
        "A fox found a red scarf in the snow and gave it to a shivering hare, and they were friends from then on."
    ),
    "Tell me a very short story about a king. | Write a tiny story about a king.": (
        "A king lost his crown in a river, and found that he was happier without it."
    ),
    "Write a sentence about rain. | Say something nice about rain.": (
        "The rain drummed on the roof all night, and in the morning the garden was green."
    ),
    "Write a sentence about the city. | Describe a city in one sentence.": (
        "The city hummed with trams and voices long after the lamps were lit."
    ),
    "Tell me a joke. | Make me laugh.": ("Why did the scarecrow win a prize? It was outstanding in its field."),
    "Give me a riddle. | Do you know a riddle?": ("What has hands but cannot clap? A clock."),
    "Name three fruits. | List three fruits.": "Apples, pears and cherries.",
    "Name two rivers. | List two rivers.": "The Nile and the Danube.",
    "Name four colours. | List four colours.": "Red, blue, green and yellow.",
    "Give me a name for my cat. | What should I call my cat?": "Call your cat Pepper.",
    "Say 'thank you' in Spanish. | How do you say 'thank you' in Spanish?": "You say 'gracias'.",
    "Describe a castle. | What does a castle look like?": (
        "A castle has thick stone walls, tall towers, a gate and often a ditch full of water."
    ),
}

CHAT = {
    "Hello! | Hi! | Good morning.": "Hello! What would you like to know?",
    "How are you? | How are you today?": "I am well, thank you. What can I do for you?",
    "Who are you? | What is your name?": "I am a small language model, and I answer your questions.",
    "Thank you! | Thanks a lot.": "You are welcome. Ask me anything else you like.",
    "Goodbye. | Bye!": "Goodbye, and have a good day.",
    "What can you do? | What are you good at?": "I can answer short questions and explain simple things.",
    "Are you a human? | Are you a person?": "No, I am a computer program that works with words.",
    "I am bored. | What can I do against boredom?": (
        "Take a walk, call a friend, or draw what you see from your window."
    ),
    "I am sad today. | I feel sad.": "I am sorry to hear that. It may help to talk with a friend.",
    "You are wrong. | That is not right.": "I am sorry. Tell me what is wrong and I will try again.",
}

OPINIONS = {
    "Which is better, tea or coffee? | Should I drink tea or coffee?": (
        "That is a matter of taste: coffee wakes you faster, and tea is gentler."
    ),
    "Are cats better than dogs? | Should I get a cat or a dog?": (
        "Cats need less time and dogs give more company, so it depends on your days."
    ),
    "What is the best book? | Which book is the best of all?": ("There is no best book, only one that suits you now."),
    "Is it better to live in a city or in a village? | City or village?": (
        "A city has more to do and a village has more peace."
    ),
    "What is the most beautiful flower? | Which flower is the prettiest?": (
        "Many people would say the rose, but others love tulips more."
    ),
    "Is maths hard? | Is mathematics difficult?": "It is hard at first, and becomes easier with practice.",
}

UNKNOWABLE = {
    "What will the weather be next month? | Will it rain in ten days?": "Nobody can know that yet.",
    "What did I eat for breakfast? | What did I have for dinner yesterday?": "I cannot know what you ate.",
    "Which number am I thinking of? | Guess my number.": "I cannot know your number.",
    "Who will win the next election? | Who will be the next president?": (
        "Nobody can know that before the votes are counted."
    ),
    "What is my name? | Do you know who I am?": "I do not know your name.",
    "What time is it? | What is the time now?": "I have no clock, so I cannot know the time.",
    "Will I be rich one day? | Shall I ever be rich?": "Nobody can know that.",
    "How many birds are in the air right now? | How many ants are there exactly?": "Nobody has counted them.",
}
